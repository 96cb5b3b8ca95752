"""Training of text-defined keyword spotting. Import the public names from `hf_ext`: this package itself loads none of its modules."""

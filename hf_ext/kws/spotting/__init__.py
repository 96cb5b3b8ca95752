"""Finding typed phrases in audio: the pipeline and what streams."""

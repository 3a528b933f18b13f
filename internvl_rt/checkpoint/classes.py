"""Which model classes run, by the names in their config.json, and which of their relatives do not, and why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from internvl_rt.checkpoint.json_section import UNSUPPORTED, Section


@dataclass(frozen=True, slots=True)
class ModelClass:
    """InternVL's classes, under one of the names that they have.

    format: how its config.json is read, and by whose conventions prompts and pictures are made
    mixed: each section of its config.json, and some keys beside them, may be those of either format
    vision_bias: what a vision section means by default that says nothing of biases; None: what the format means
    text_type: the model_type of a text_config that names none
    other_template: what to do if config.json names a template that is not known
    picture: what stands for a picture in the folder's chat template
    """

    architecture: str
    model_types: tuple[str, ...]
    vision_types: tuple[str, ...]  # patterns; the first is what a missing one means
    format: Literal["original", "hf"]
    mixed: bool = False
    vision_bias: bool | None = None
    text_type: str = "qwen2"
    other_template: str = UNSUPPORTED
    picture: str = "<IMG_CONTEXT>"


class _Relative(NamedTuple):
    """A model that has much of InternVL's code, but does not run here."""

    name: str
    marks: tuple[str, ...]  # each a class, a model_type, or a module with the model's own code
    reason: str
    runs: str  # what runs instead


_SKYWORK = (
    "of this class the models with that template run, such as Skywork-R1V2 and R1V3 if theirs is; R1V (v1) does not: "
    "its turns are those of DeepSeek-R1, without <|im_end|>; choose another of the InternVL family"
)
_ORIGINAL_VIT, _OTHER_INTERN = ("intern_vit_6b",), "Intern-S1-mini and Intern-S1"
CLASSES = (
    ModelClass("InternVLChatModel", ("internvl_chat",), _ORIGINAL_VIT, "original"),
    # VisualPRM's class has no other weights: it scores steps by the language model's head.
    ModelClass("InternVLRewardModel", ("internvl_chat",), _ORIGINAL_VIT, "original"),
    ModelClass(
        "SkyworkR1VChatModel",
        ("skywork_chat",),
        (*_ORIGINAL_VIT, "skywork_*"),
        "original",
        other_template=_SKYWORK,
    ),
    ModelClass("InternVLForConditionalGeneration", ("internvl",), ("internvl_vision",), "hf"),
    ModelClass(
        "InternS1ForConditionalGeneration",
        ("interns1", "intern_s1"),
        ("interns1_vision", "intern_s1_vision"),
        "hf",
    ),
    ModelClass(
        "QianfanOCRForConditionalGeneration",
        ("qianfan_ocr",),
        ("qianfan_ocr_vision", *_ORIGINAL_VIT),
        "hf",
        mixed=True,
        vision_bias=True,
        text_type="qwen3",
        picture="<image>",
    ),
)
_RELATIVES = (
    _Relative(
        "InternVL-U",
        ("InternVLUChatModel", "internvlu_chat"),
        "it also makes pictures, by a second model that is not computed here",
        "InternVL3.5",
    ),
    _Relative(
        "InternVideo2.5",
        ("modeling_internvl_chat_hico", "modeling_internvl_chat_hico2"),
        "it merges the visual tokens of four frames to 64",
        "InternVL2.5-8B",
    ),
    _Relative(
        "Mono-InternVL",
        ("InternLM2VEForCausalLM",),
        "it has no vision tower, but experts for pictures in its language model",
        "InternVL2.5-2B",
    ),
    _Relative(
        "SAIL-VL",
        ("SAILVLModel", "SailVLModel"),
        "its vision tower and its template are its own",
        "InternVL3.5",
    ),
    _Relative(
        "NVLM-D",
        ("NVLM_D", "NVLM_D_Model"),
        "its tiles have tags in the prompt, and its projector has another shape",
        "InternVL3-78B",
    ),
    _Relative(
        "H2OVL-Mississippi",
        ("H2OVLChatModel", "h2ovl_chat"),
        "its language model is Mistral's, and its tiles and templates are its own",
        "InternVL3-1B and InternVL3-2B",
    ),
    _Relative(
        "Yuan-VL",
        ("YuanVLChatModel",),
        "its language model is Yuan's, with another attention",
        "InternVL3.5-30B-A3B",
    ),
    _Relative(
        "Intern-S1-Pro",
        ("InternS1ProForConditionalGeneration", "interns1_pro"),
        "its vision tower takes pictures of any size, and its positions and experts are its own",
        _OTHER_INTERN,
    ),
    _Relative(
        "Intern-S1.1",
        ("InternS1_1_ForConditionalGeneration", "interns1_1"),
        "its vision tower takes pictures of any size, and it reads time series",
        _OTHER_INTERN,
    ),
    _Relative(
        "Intern-S2",
        (
            *("InternS2PreviewForConditionalGeneration", "InternS2PreviewForCausalLM"),
            *("InternS2MobiusForConditionalGeneration", "InternS2MobiusForCausalLM", "interns2_mobius"),
        ),
        "most of its layers have linear attention",
        _OTHER_INTERN,
    ),
    _Relative(
        "Qianfan-VL",
        ("qianfanvl_chat",),
        "its larger models scale rotary positions as Llama 3.1 does, and its template is not known",
        "Qianfan-OCR",
    ),
    _Relative(
        "the port of InternVL3.5-Flash to transformers",
        ("internvl_flash",),
        "it has four rounds of attention between patches, and the official code another one",
        "InternVL3.5-Flash in the original format",
    ),
)
RELATIVES: Mapping[str, _Relative] = {mark: relative for relative in _RELATIVES for mark in relative.marks}


def find_class(top: Section) -> ModelClass:
    """Returns the class of a config.json. Raises ConfigError if it is none that runs; a known relative is named."""
    for key, mark in _marks(top):
        if relative := RELATIVES.get(mark):
            raise top.refusal(
                key,
                f"a class that runs here, which {relative.name} is not: {relative.reason}",
                f"{relative.runs} can be used instead",
            )
    model_type = top.choice("model_type", tuple(dict.fromkeys(each for one in CLASSES for each in one.model_types)))
    found = [one for one in CLASSES if model_type in one.model_types]
    top.support("architectures", *([one.architecture] for one in found))
    name = top.values.get("architectures", [found[0].architecture])[0]
    return next(one for one in found if one.architecture == name)


def check_vision_type(kind: ModelClass, vision: Section) -> None:
    """Raises ConfigError if the vision section is of another class than InternViT's."""
    given = vision.values.get("model_type", kind.vision_types[0])
    if not isinstance(given, str) or not any(fnmatchcase(given, one) for one in kind.vision_types):
        raise vision.refusal("model_type", " or ".join(map(repr, kind.vision_types)), UNSUPPORTED)


def _marks(top: Section) -> Iterator[tuple[str, str]]:
    """Yields the names by which a relative is known, each with the key at the top of config.json under which it is."""
    values = top.values
    yield from (("architectures", name) for name in _first(values.get("architectures")))
    if isinstance(values.get("model_type"), str):
        yield "model_type", values["model_type"]
    for key in ("llm_config", "text_config"):
        section = values.get(key)
        if isinstance(section, dict):
            yield from ((key, name) for name in _first(section.get("architectures")))
    modules = values.get("auto_map")
    if isinstance(modules, dict):
        # "repository--module.Class", where the repository may be left out
        names = (name.rpartition("--")[2].partition(".")[0] for name in modules.values() if isinstance(name, str))
        yield from (("auto_map", name) for name in names)


def _first(names: Any) -> list[str]:
    return names[:1] if isinstance(names, list) and names and isinstance(names[0], str) else []

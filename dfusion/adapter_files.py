"""Adapter files of diffusers, PEFT and kohya: what is in them, checked without torch.

A file is recognised by its keys:

diffusers  unet.down_blocks.0.….to_q.lora.down.weight; alpha in the file's metadata, otherwise the rank
PEFT       base_model.model.down_blocks.0.….to_q.lora_A.weight; alpha in adapter_config.json next to the file
kohya      lora_unet_down_blocks_0_…_to_q.lora_down.weight, for SDXL lora_unet_input_blocks_4_1_…; alpha of each layer

Files of diffusers and kohya may also adapt text encoders: text_encoder.…, text_encoder_2.…; lora_te_… or lora_te1_…,
lora_te2_….

Every key must be understood. Anything else (LoHa, full weights, …) is refused by its name, since an adapter that is
loaded in part is another adapter.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from dfusion.config import GROUPS, LoraConfig
from dfusion.errors import AdapterError, shortened
from dfusion.lora_layers import Shapes, groups_of

AdapterForm = Literal["diffusers", "PEFT", "kohya"]
Kind = Literal["down", "up", "alpha", "magnitude"]
METADATA = "lora_adapter_metadata"
"""The key of diffusers' metadata: the settings of peft's LoraConfig as JSON, each with the prefix "unet."."""
UNET = "unet."
_PEFT = "base_model.model."
_KOHYA = "lora_unet_"
_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names of an adapter's file in a folder: PEFT's, diffusers'."""
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
"""The first bytes of what torch.save writes, today and in versions before 1.6."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_TEXT_ENCODERS: Mapping[str, tuple[AdapterForm, str]] = {
    "text_encoder.": ("diffusers", "text_encoder"),
    "text_encoder_2.": ("diffusers", "text_encoder_2"),
    "lora_te_": ("kohya", "text_encoder"),
    "lora_te1_": ("kohya", "text_encoder"),
    "lora_te2_": ("kohya", "text_encoder_2"),
}
"""Prefixes of the keys of text encoders: their formats, and the encoders' names in a pipeline."""
_PEFT_TEXT_ENCODER = f"{_PEFT}text_model."
TEXT_MODEL = "text_model."
"""The prefix of a text encoder's layers in adapters. Networks of some versions of transformers do not have it."""
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The ends of the layers of a text encoder that diffusers adapts."""
_OTHER_KINDS: Mapping[str, str] = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "DoRA of LyCORIS": r"\.dora_scale$",
    "BOFT": r"\.boft_",
    "OFT": r"\.oft_",
    "(IA)3": r"\.ia3_l|\.on_input$",
    "VeRA": r"\bvera_",
    "HRA": r"\.hra_u",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with a Tucker decomposition": r"\.lora_mid\.",
    "full weights (.diff)": r"\.diff(_b)?$",
    "trained norms": r"\.[wb]_norm$",
    "a textual inversion": r"^emb_params$|^bundle_emb\.|^string_to_param",
    "LoRA with biases": r"lora(_B|_up|\.up)\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_",
}
"""Kinds of adapters that cannot be loaded, and patterns by which their keys are known."""
_PARTS: Mapping[str, Kind] = {
    r"\.lora_A(?:\.default)?\.weight": "down",
    r"\.lora_B(?:\.default)?\.weight": "up",
    r"\.lora(?:_linear_layer)?\.down\.weight": "down",
    r"\.lora(?:_linear_layer)?\.up\.weight": "up",
    r"_lora\.down\.weight": "down",
    r"_lora\.up\.weight": "up",
    r"\.lora_down\.weight": "down",
    r"\.lora_up\.weight": "up",
    r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?": "magnitude",
    r"\.alpha": "alpha",
}
"""The ends of keys, after the name of a layer."""
_COMPOUNDS = (
    "down_blocks",
    "up_blocks",
    "mid_block",
    "input_blocks",
    "output_blocks",
    "middle_block",
    "transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
)
"""Names of layers that contain "_", which kohya's keys also have instead of the dots."""
_TEXT_COMPOUNDS = ("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection")
"""The same for text encoders."""
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its dtype by safetensors' name, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer's part of an adapter.

    rank       of its matrices
    alpha      with the rank it gives the scale of B A
    down, up   the keys of A and B in the file
    magnitude  the key of DoRA's magnitude vector; None without DoRA
    """

    rank: int
    alpha: float
    down: str
    up: str
    magnitude: str | None = None


@dataclass(frozen=True)
class AdapterLayout:
    """The content of an adapter's file, without its weights.

    file           the safetensors file
    form           its format
    tensors        its tensors by key
    layers         the adapted layers by their names in diffusers' U-Net
    text_encoders  the adapted layers of text encoders, by the encoders' names in a pipeline and by their names with
                   "text_model."; their scale is always alpha / rank
    use_rslora     whether the U-Net's scale is alpha / sqrt(rank) instead of alpha / rank
    init           the initialisation; Kaiming, peft's default, if the file does not say
    settings       the settings of peft's LoraConfig for the U-Net in the file, or next to it
    metadata       the file's metadata
    """

    file: Path
    form: AdapterForm
    tensors: Mapping[str, StoredTensor]
    layers: Mapping[str, AdaptedLayer]
    text_encoders: Mapping[str, Mapping[str, AdaptedLayer]]
    use_rslora: bool
    init: Literal["gaussian", "kaiming"]
    settings: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def use_dora(self) -> bool:
        """Whether it is a DoRA."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    def config(self, shapes: Shapes | None = None) -> LoraConfig:
        """The LoRA settings of the adapter.

        With the `shapes` of a U-Net, `targets` names groups of layers if the adapter has all layers of these groups.

        Raises:
            AdapterError: A rank or alpha is out of range.
        """
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        alphas = {name: layer.alpha for name, layer in self.layers.items()}
        rank = _most_common(ranks.values())
        alpha = _most_common(alphas.values())
        try:
            return LoraConfig(
                rank=rank,
                alpha=alpha,
                init=self.init,
                targets=self._targets(shapes),
                rank_pattern={name: value for name, value in ranks.items() if value != rank},
                alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
            )
        except ValidationError as error:
            raise AdapterError(f"{self.file}: expected the settings of a LoRA: {error}") from error

    def _targets(self, shapes: Shapes | None) -> tuple[str, ...]:
        if shapes is not None:
            return groups_of(shapes, self.layers) or tuple(sorted(self.layers))
        named = self.settings.get("target_modules")
        for groups in GROUPS.values():
            if isinstance(named, list) and sorted(map(str, named)) == sorted(groups):
                return tuple(name for name, layers in GROUPS.items() if layers == groups)
        return tuple(sorted(self.layers))

    def require_fit(self, shapes: Shapes) -> None:
        """Raise AdapterError, naming the first layer that does not fit, unless the U-Net has all adapted layers.

        Args:
            shapes: The shapes of the U-Net's parameters by name.
        """
        for name, layer in self.layers.items():
            weight = shapes.get(f"{name}.weight", ())
            if len(weight) not in (2, 4):
                raise AdapterError(f"{self.file}: the adapter is for another model: this U-Net has no layer {name}")
            out, width, *kernel = weight
            self._require_shape(layer.down, (layer.rank, width, *kernel))
            self._require_shape(layer.up, (out, layer.rank))
            if layer.magnitude is not None:
                self._require_shape(layer.magnitude, (1, out) if kernel else (out,))

    def require_text_encoders(self, encoders: Mapping[str, Shapes | None]) -> None:
        """Raise AdapterError, naming the first layer that does not fit, unless the encoders have all adapted layers.

        Args:
            encoders: The shapes of the text encoders' parameters by name; None for one that is not checked.
        """
        for encoder, layers in self.text_encoders.items():
            if encoder not in encoders:
                key = next(iter(layers.values())).down
                raise AdapterError(
                    f"{self.file}: the adapter is for another model: got {key}, but this model has no {encoder}"
                )
            shapes = encoders[encoder]
            if shapes is None:
                continue
            for name, layer in layers.items():
                weight = shapes.get(f"{name}.weight", shapes.get(f"{name.removeprefix(TEXT_MODEL)}.weight", ()))
                if len(weight) != 2:
                    raise AdapterError(f"{self.file}: the adapter is for another model: {encoder} has no layer {name}")
                self._require_shape(layer.down, (layer.rank, weight[1]))
                self._require_shape(layer.up, (weight[0], layer.rank))

    def _require_shape(self, key: str, expected: tuple[int, ...]) -> None:
        got = self.tensors[key].shape
        if _without_ones(got) != _without_ones(expected):
            what = f"expected {key} of shape {expected}, got {got}"
            raise AdapterError(f"{self.file}: the adapter is for another model: {what}")

    def require_finite(self) -> None:
        """Raise AdapterError, naming the tensor, if a value is NaN or infinite. Reads the whole file."""
        content = np.memmap(self.file, np.uint8, "r")
        for key, tensor in self.tensors.items():
            if not _is_finite(content[tensor.start : tensor.stop], tensor.dtype):
                raise AdapterError(f"{self.file}: expected finite numbers, got NaN or infinity in {key}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing ones: a 1 x 1 convolution and a linear layer hold the same matrix."""
    length = len(shape)
    while length > 2 and shape[length - 1] == 1:
        length -= 1
    return shape[:length]


def _is_finite(content: np.ndarray, dtype: str) -> bool:
    if dtype == "BF16":  # the upper half of a float32; with all bits of the exponent it is not a number
        return not bool(np.any((content.view("<u2") & 0x7F80) == 0x7F80))
    return bool(np.isfinite(content.view(f"<f{_ITEM_BYTES[dtype]}")).all())


def _most_common(values: Iterable[Any]) -> Any:
    """The most common value; of several, the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def read_layout(path: Path, per_block: int = 2) -> AdapterLayout:
    """Read which layers an adapter's file adapts, and how, and check all its values.

    Args:
        path: The file, or a folder with `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`.
        per_block: Layers of each block of the U-Net (`layers_per_block`). Names of SDXL in kohya's files depend on it.

    Raises:
        AdapterError: A pickle, a damaged file, another kind of adapter, an unknown key, NaN, no layers of the U-Net.
            The message names it.
    """
    file = _file_of(path)
    tensors, metadata = read_header(file)
    _refuse_other_kinds(file, tensors)
    form = _form_of(file, tensors)

    # 1. the keys of each layer of each network
    keys: dict[str | None, dict[str, dict[Kind, str]]] = {None: {}}
    for key in tensors:
        encoder, name, part = _layer_of(file, key, form, per_block)
        parts = keys.setdefault(encoder, {}).setdefault(name, {})
        if part in parts:
            raise AdapterError(f"{file}: expected one {part} matrix of {name}, got {parts[part]} and {key}")
        parts[part] = key

    # 2. the U-Net's ranks and alphas
    settings = _settings_of(file, form, metadata, UNET)
    layers = _layers(file, tensors, keys.pop(None), settings)
    if not layers:
        raise AdapterError(f"{file}: expected layers of the U-Net, got only those of a text encoder ({min(tensors)})")
    with_magnitude = {name for name, layer in layers.items() if layer.magnitude is not None}
    if with_magnitude and with_magnitude != layers.keys():
        missing = min(layers.keys() - with_magnitude)
        raise AdapterError(f"{file}: expected DoRA's magnitude of every layer, got none of {missing}")

    # 3. those of the text encoders
    text_encoders = {}
    for encoder in sorted(filter(None, keys)):
        of_encoder = _settings_of(file, form, metadata, f"{encoder}.")
        text_encoders[encoder] = _text_layers(file, _layers(file, tensors, keys[encoder], of_encoder), of_encoder)

    init: Literal["gaussian", "kaiming"] = "gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming"
    use_rslora = settings.get("use_rslora", False) is True
    layout = AdapterLayout(file, form, tensors, layers, text_encoders, use_rslora, init, settings, metadata)
    layout.require_finite()
    return layout


def _layers(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    keys: Mapping[str, Mapping[Kind, str]],
    settings: Mapping[str, Any],
) -> dict[str, AdaptedLayer]:
    """The adapted layers of a network."""
    alphas = _alphas(file, tensors, keys)
    return {name: _layer(file, name, parts, tensors, alphas, settings) for name, parts in sorted(keys.items())}


def _text_layers(
    file: Path, layers: Mapping[str, AdaptedLayer], settings: Mapping[str, Any]
) -> dict[str, AdaptedLayer]:
    """The layers of a text encoder, with rsLoRA's alpha / sqrt(rank) as alpha / rank."""
    result = {}
    for name, layer in layers.items():
        if layer.magnitude is not None:
            raise AdapterError(f"{file}: expected a LoRA of the text encoder, got a DoRA ({layer.magnitude})")
        if not name.endswith(_TEXT_LAYERS):
            expected = f"layers of the text encoder's attention and MLP ({', '.join(_TEXT_LAYERS)})"
            raise AdapterError(f"{file}: expected {expected}, got {layer.down}")
        factor = math.sqrt(layer.rank) if settings.get("use_rslora") is True else 1.0
        result[name] = replace(layer, alpha=layer.alpha * factor)
    return result


def _file_of(path: Path) -> Path:
    if not os.path.isdir(path):  # False for names that the file system refuses
        return path
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    got = f"a pickle, {pickles[0]}" if pickles else "neither"
    raise AdapterError(f"{path}: expected {' or '.join(_WEIGHTS)}, got {got}")


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, without the values. Raises AdapterError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            is_whole = len(start) == 8 and length <= min(_MAX_HEADER, size)
            header = stream.read(length) if is_whole else b""
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not is_whole and (start[:4] == _ZIP or start[:1] == _PICKLE or file.suffix in _PICKLES):
        raise AdapterError(f"{file}: expected a safetensors file, got a pickle, which can run code when it is loaded")

    try:
        content = json.loads(header)
        metadata = dict(content.pop("__metadata__", None) or {})
        tensors = {key: _stored(entry, 8 + length) for key, entry in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: expected a complete safetensors file: {error!r}") from error

    for key, tensor in tensors.items():
        expected = math.prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0)
        if tensor.dtype not in _ITEM_BYTES:
            expected_types = ", ".join(_ITEM_BYTES)
            raise AdapterError(f"{file}: expected tensors of {expected_types}, got {tensor.dtype} in {key}")
        if tensor.stop - tensor.start != expected or not 0 < tensor.start <= tensor.stop <= size:
            raise AdapterError(f"{file}: expected a complete safetensors file, got a part of {key}")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def read_shapes(folder: Path, part: str = "unet") -> Shapes | None:
    """The shapes of the parameters of a pipeline's network, from its safetensors files. None if they cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in sorted((folder / part).glob("*.safetensors")):
            tensors, _ = read_header(file)
            shapes |= {name: tensor.shape for name, tensor in tensors.items()}
    except AdapterError:
        return None
    return shapes or None


def layers_per_block(folder: Path) -> int:
    """The layers of each block of a pipeline's U-Net; 2, as Stable Diffusion's, if its config does not say."""
    try:
        number = json.loads((folder / "unet" / "config.json").read_text("utf-8")).get("layers_per_block", 2)
    except (AttributeError, OSError, ValueError):
        return 2
    return number if isinstance(number, int) else 2


def _stored(entry: Mapping[str, Any], offset: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), offset + int(start), offset + int(stop))


def _refuse_other_kinds(file: Path, keys: Iterable[str]) -> None:
    for key in keys:
        if key.startswith(_PEFT_TEXT_ENCODER):
            raise AdapterError(f"{file}: expected PEFT's file of the U-Net, got one of a text encoder ({key})")
        for kind, pattern in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise AdapterError(f"{file}: expected a LoRA, got {kind} ({key})")


def _form_of(file: Path, keys: Iterable[str]) -> AdapterForm:
    prefixes: dict[str, AdapterForm] = {_KOHYA: "kohya", _PEFT: "PEFT", UNET: "diffusers"}
    prefixes |= {prefix: form for prefix, (form, _) in _TEXT_ENCODERS.items()}
    forms = {prefixes[prefix]: key for key in keys for prefix in prefixes if key.startswith(prefix)}
    if len(forms) > 1:
        raise AdapterError(f"{file}: expected the keys of one format, got {', '.join(forms.values())}")
    if forms:
        return next(iter(forms))
    if any(re.search(r"lora[._](?:down|up|A|B)\b", key) for key in keys):
        return "diffusers"  # also without a prefix
    raise AdapterError(f"{file}: expected the keys of a LoRA, got {shortened(sorted(keys))}")


def _settings_of(file: Path, form: AdapterForm, metadata: Mapping[str, str], prefix: str) -> Mapping[str, Any]:
    """The settings of peft's LoraConfig for the network with this prefix; empty if the file has none."""
    source = f"{file}: expected the metadata of an adapter"
    try:
        if form == "PEFT":
            config_file = file.with_name("adapter_config.json")
            if not config_file.is_file():
                raise AdapterError(f"{file}: expected adapter_config.json (with alpha) next to the file, got none")
            source = f"{config_file}: expected the settings of an adapter"
            stored = json.loads(config_file.read_text("utf-8"))
        else:
            stored = json.loads(metadata.get(METADATA, "{}"))
        settings: dict[str, Any] = {}
        for key, value in stored.items():
            if prefix == UNET or key.startswith(prefix):  # settings of the U-Net may have no prefix
                settings[key.removeprefix(prefix)] = value
        for name in ("rank_pattern", "alpha_pattern"):
            settings[name] = dict(settings.get(name) or {})
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{source}: {error!r}") from error

    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{file}: expected a LoRA, got {kind}")
    for name in ("modules_to_save", "layer_replication", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"):
        if settings.get(name):
            raise AdapterError(f"{file}: expected a LoRA without {name}, got {settings[name]!r}")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{file}: expected a LoRA without biases, got bias {settings['bias']!r}")
    return settings


def _layer_of(file: Path, key: str, form: AdapterForm, per_block: int) -> tuple[str | None, str, Kind]:
    """The text encoder (None: the U-Net), the layer and the part of the adapter that a key names."""
    ends = ((re.search(end + "$", key), part) for end, part in _PARTS.items())
    match, part = next(((match, part) for match, part in ends if match is not None), (None, None))
    if match is None or part is None:
        raise AdapterError(f"{file}: expected the keys of a LoRA, got {key}")

    name = key[: match.start()]
    for prefix, (_, encoder) in _TEXT_ENCODERS.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            name = _dotted(name, _TEXT_COMPOUNDS) if form == "kohya" else name
            name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)  # of old versions of diffusers
            return encoder, TEXT_MODEL + name.removeprefix(TEXT_MODEL), part

    if form == "kohya":
        return None, _unet_name(file, name.removeprefix(_KOHYA), per_block), part
    name = name.removeprefix(_PEFT if form == "PEFT" else UNET).replace(".processor.", ".")
    return None, re.sub(r"\.to_out$", ".to_out.0", name), part


def _dotted(name: str, compounds: Iterable[str]) -> str:
    """The name of a layer in a kohya file, in which "_" separates the parts, with dots."""
    dotted = name.replace("_", ".")
    for compound in compounds:
        pattern = r"(?<![^.])" + re.escape(compound.replace("_", ".")) + r"(?![^.])"
        dotted = re.sub(pattern, compound, dotted)
    return dotted


def _unet_name(file: Path, name: str, per_block: int) -> str:
    """The name in diffusers' U-Net of a layer in a kohya file."""
    dotted = _dotted(name, _COMPOUNDS)
    if not dotted.startswith(("input_blocks.", "middle_block.", "output_blocks.")):
        return dotted

    # SDXL: the original code's names; see `dfusion.export.original_name`
    if middle := re.fullmatch(r"middle_block\.1\.(.+)", dotted):
        return f"mid_block.attentions.0.{middle[1]}"
    side = re.fullmatch(r"(input|output)_blocks\.(\d+)\.1\.((?:transformer_blocks|proj_in|proj_out)\b.*)", dotted)
    if side is None:
        raise AdapterError(f"{file}: expected layers of the U-Net's transformers, got LoCon's convolution {name}")
    number = int(side[2]) - (1 if side[1] == "input" else 0)
    block, attention = divmod(number, per_block + 1)
    return f"{'down' if side[1] == 'input' else 'up'}_blocks.{block}.attentions.{attention}.{side[3]}"


def _alphas(
    file: Path, tensors: Mapping[str, StoredTensor], keys: Mapping[str, Mapping[Kind, str]]
) -> dict[str, float]:
    """The alpha of each layer that has one in the file."""
    alphas: dict[str, float] = {}
    content = np.memmap(file, np.uint8, "r")
    for name, parts in keys.items():
        if "alpha" not in parts:
            continue
        tensor = tensors[parts["alpha"]]
        if math.prod(tensor.shape) != 1:
            raise AdapterError(f"{file}: expected one number in {parts['alpha']}, got shape {tensor.shape}")
        stored = content[tensor.start : tensor.stop]
        if tensor.dtype == "BF16":
            stored = np.concatenate([np.zeros(2, np.uint8), stored])
        alphas[name] = float(stored.view(f"<f{len(stored)}")[0])
    return alphas


def _layer(
    file: Path,
    name: str,
    parts: Mapping[Kind, str],
    tensors: Mapping[str, StoredTensor],
    alphas: Mapping[str, float],
    settings: Mapping[str, Any],
) -> AdaptedLayer:
    for part in ("down", "up"):
        if part not in parts:
            raise AdapterError(f"{file}: expected both matrices of {name}, got no {part} matrix")
        if len(tensors[parts[part]].shape) not in (2, 4):
            raise AdapterError(f"{file}: expected a matrix, got {parts[part]} of {tensors[parts[part]].shape}")

    rank = tensors[parts["down"]].shape[0]
    if tensors[parts["up"]].shape[1] != rank:
        shapes = f"{tensors[parts['down']].shape} and {tensors[parts['up']].shape}"
        raise AdapterError(f"{file}: expected matrices of one rank of {name}, got shapes {shapes}")

    alpha = _pattern_value(file, name, settings["alpha_pattern"], settings.get("lora_alpha", rank))
    alpha = (alphas[name] or rank) if name in alphas else alpha  # kohya's trainer reads 0 as the rank
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise AdapterError(f"{file}: expected the metadata of an adapter: alpha of {name} > 0, got {alpha!r}")
    return AdaptedLayer(rank, float(alpha), parts["down"], parts["up"], parts.get("magnitude"))


def _pattern_value(file: Path, name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key of a peft pattern, a regular expression of a name's end, that matches."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise AdapterError(f"{file}: expected patterns of layers, got {key!r}: {error}") from error
    return default

"""Which images may be compared: what a manifest says of how they were made, and where two differ. Imports no torch."""

from common.errors import UserError

COMPARED = {  # what should be equal for the models alone to differ: the manifest's keys by what they are called
    "seed": ("seed", "seed_per_prompt"), "steps": ("num_inference_steps",), "guidance": ("cfg", "cfg_convention"),
    "empty prompt": ("empty_prompt", "negative_prompt"), "size": ("height", "width"), "scheduler": ("scheduler",),
    "dtype": ("unet_dtype", "text_encoder_dtype", "vae_dtype", "latents_dtype", "noise_dtype"), "noise": ("noise_device",),
    "base": ("base_identity",), "VAE": ("vae_identity",),
}
SHOWN = {"base": "pretrained_model_name_or_path", "VAE": "pretrained_vae_model_name_or_path"}  # what an identity is called
IN_WORDS = {"seed_per_prompt": {True: "one per prompt", False: ""}}
OF_ONE_IMAGE = ("index", "k", "image_seed")


def describe_model(manifest: str, entries: list[dict]) -> dict:
    """Checkpoint, base, identities and settings as the manifest has them; settings None where it records none, as the
    official program's."""
    recorded = [entry["metadata"] for entry in entries if isinstance(entry.get("metadata"), dict)]
    ours = len(recorded) == len(entries) and all("base_identity" in of for of in recorded)
    names = [name for name in recorded[0] if name not in OF_ONE_IMAGE] if ours else []
    settings = {name: recorded[0][name] if all(of.get(name) == recorded[0][name] for of in recorded) else "several"
                for name in names}
    named = {"checkpoint": "unet_path", "identity": "unet_identity", "base": "pretrained_model_name_or_path", "lora": "lora"}
    return {"manifest": manifest, **{name: settings.pop(key, None) for name, key in named.items()}, "settings": settings or None}


def different_settings(a: dict, b: dict) -> list[dict]:
    """What the two models of describe_model do not share, of what both record."""
    found = []
    for what, keys in COMPARED.items():
        keys = [key for key in keys if key in (a["settings"] or {}) and key in (b["settings"] or {})]
        values = [[model["settings"][key] for key in keys] for model in (a, b)]
        if values[0] != values[1]:
            named = [key for key in keys if a["settings"][key] != b["settings"][key]] if what == "dtype" else keys
            found.append({"what": what, "a": in_words(what, a, named), "b": in_words(what, b, named)})
    return found


def in_words(what: str, model: dict, keys: list[str]) -> str:
    values = [str(IN_WORDS.get(key, {}).get(model["settings"][key], model["settings"][key])) for key in keys]
    values = ("x" if what == "size" else " ").join(filter(None, values))
    name = model["base"] if what == "base" else model["settings"].get(SHOWN.get(what))
    return f"{name} ({values})" if what in SHOWN and name else values


def check_comparable(a: dict, b: dict, labels: tuple[str, str], allowed: bool) -> tuple[list[dict], list[str]]:
    """The differences of describe_model's a and b, and notes on what could not be compared. Raises UserError where there
    are differences, unless they are allowed."""
    notes = [f"{label} records no settings: whether the two were made alike is not known"
             for label, model in zip(labels, (a, b)) if model["settings"] is None]
    differences = different_settings(a, b)
    if differences and not allowed:
        told = "; ".join(f"{of['what']} {of['a']} and {of['b']}" for of in differences)
        raise UserError(f"the images of {labels[0]} and {labels[1]} were made with different settings ({told}): generate both "
                        "alike, or compare them as they are with --allow_different_settings")
    return differences, notes


def settings_table(models: dict[str, dict]) -> list[tuple[str, str, str, bool]]:
    """Rows of the page's table: name, A's and B's value, and whether they differ."""
    rows = [(name, *(text_of(models[side].get(name)) for side in "ab")) for name in ("checkpoint", "identity", "base")]
    rows.append(("LoRA", *(lora_text(models[side].get("lora")) for side in "ab")))
    sides = [models[side]["settings"] or {} for side in "ab"]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        rows.append((name.replace("_", " "), *(text_of(settings.get(name)) for settings in sides)))
    return [(*row, row[1] != row[2]) for row in rows if (row[1], row[2]) != ("-", "-")]


def text_of(value) -> str:
    return "-" if value is None or value == "" else str(value)


def lora_text(facts) -> str:
    if not isinstance(facts, dict):
        return "-"
    init = f", weights of {facts['unet_init']}" if facts.get("unet_init") else ""
    return f"rank {facts.get('rank')}, alpha {facts.get('alpha')}, trained on {facts.get('base')}{init}"

"""The adapters at hand and their sliders; needs no ComfyUI."""

import logging
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from hf_causal_context.adapter.config import CausalContextConfig
from hf_causal_context.adapter.storage.layout import AdapterError
from hf_causal_context.contexts import OBSERVATIONAL

CONFIG = "adapter_config.json"


def adapters_at_hand(roots, cache=HF_HUB_CACHE):
    """Return the folders of adapters in some folders, and of those in the cache of the Hub, by what to call them."""
    found = {config.parent.name: config.parent for root in roots for config in sorted(Path(root).glob(f"*/{CONFIG}"))}
    for cached in sorted(Path(cache).glob("models--*")):
        repository = cached.name.removeprefix("models--").replace("--", "/")
        config = try_to_load_from_cache(repository, CONFIG, cache_dir=cache)
        if isinstance(config, str) and '"CAUSAL_CONTEXT"' in Path(config).read_text(errors="replace"):
            found[repository] = Path(config).parent
    return found


def sliders(folder):
    """Return what the sliders of an adapter are for, by their ids, in which dots would mean something to ComfyUI."""
    try:
        config = CausalContextConfig.read(folder, str(folder))
    except AdapterError as error:
        logging.warning("%s Its node has no sliders.", error)  # and raises the error when it runs
        return {}
    names = [*config.concepts, *([OBSERVATIONAL] if config.observational_rank else [])]
    return {name.replace(".", "\u2024"): name for name in names}

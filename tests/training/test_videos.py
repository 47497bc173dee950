"""Training on videos from the command line, clips as data, and bad input."""

import json
import re
import struct
import sys
from itertools import combinations
from pathlib import Path

import diffusers
import fsspec
import numpy as np
import pytest
import torch
from datasets.packaged_modules.videofolder.videofolder import VideoFolder
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig, CausalContextPipeline, intervene, load_context_adapter
from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.cli import main
from hf_causal_context.data import check_data, load_folders
from hf_causal_context.inference.counterfactuals import counterfactual
from hf_causal_context.inference.sampling import generate
from hf_causal_context.media.videos import VIDEO_SUFFIXES, count_frames, first_frames, frame_files, save_video
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from .small import adapter_weights, settings, write_clips, write_folders
from .tiny_pipelines import stable_diffusion_3
from .tiny_videos import SIZE, VIDEOS, frames_of, wan_2_2

# Mochi asks for float32 by autocast, which is what a CPU has without.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")

OTHERS = [(name, None) for name in VIDEOS if name not in ("wan", "wan_2_2")]
RATES = {"ltx": 25, "hunyuan_video": 24, "mochi": 30, "cogvideox": 8}


def command(name, options, *flags):
    return [name, *(word for key, value in options.items() for word in (f"--{key}", str(value))), *flags]


def exported_and_loaded(adapter, pipe, folder, frames, into_second=False):
    """Clips of an adapter's context, and those of a stock pipeline with the LoRA of that context."""
    options = {"prompt": "a", "height": SIZE, "width": SIZE, "num_frames": frames, "num_inference_steps": 8}
    pipe.set_progress_bar_config(disable=True)

    def made():
        return pipe(**options, output_type="pt", generator=torch.Generator().manual_seed(0)).frames

    bare = made()
    exporting = {"adapter": adapter, "context": "slant", "format": "diffusers", "output_dir": folder}
    assert main(command("export", exporting)) == 0
    second = {"load_into_transformer_2": True} if into_second else {}
    pipe.load_lora_weights(folder, weight_name="slant.safetensors", **second)
    baked = made()
    pipe.unload_lora_weights()
    load_context_adapter(pipe, adapter)
    with intervene(pipe, "slant"):
        own = made()
    return bare, baked, own


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan", None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
        *(pytest.param("wan_2_2", expert, marks=pytest.mark.slow) for expert in ("high", "low")),
    ],
)
def test_the_command_line_trains_generates_and_exports(name, expert, pipeline_folder, tmp_path, capsys):
    common = {"resolution": SIZE, "num_frames": frames_of(name), "num_inference_steps": 2}
    given = settings(pipeline_folder(name), write_clips(tmp_path / "data", frames=9), tmp_path / "adapter", **common)
    given |= {"num_validation_images": 1, "instance_prompt": "a"} | ({"noise_expert": expert} if expert else {})
    assert main(command("train", given)) == 0
    folder = Path(given["output_dir"])
    with Image.open(folder / "samples/step-000002.png") as grid:
        assert grid.width > 5 * 64  # a strip of five frames
    card = (folder / "README.md").read_text()
    assert "text-to-video" in card
    assert "export_to_video(video, " in card
    assert f"fps={RATES.get(name, 16)})" in card
    assert main(["info", str(folder)]) == 0
    assert re.search(r"makes: +videos", capsys.readouterr().out)
    assert json.loads((folder / "adapter_config.json").read_text())["component"] == (
        {"high": "transformer", "low": "transformer_2"}[expert] if expert else None
    )
    options = {"adapter": folder, "prompt": "a", "context": "slant+thick", "seeds": 0, "output_dir": tmp_path / "clips"}
    assert main(command("generate", common | options)) == 0
    (clip,) = (tmp_path / "clips").iterdir()
    assert clip.name == "slant+thick-seed0.mp4"
    assert len(first_frames({"path": str(clip), "bytes": None}, frames_of(name))) == frames_of(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder(name), dtype=torch.float32)
    bare, baked, own = exported_and_loaded(
        str(folder), pipe, str(tmp_path / "loras"), frames_of(name), into_second=expert == "low"
    )
    change = (own - bare).abs().max()
    assert change > 1e-5
    assert (own - baked).abs().max() < change / 20


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.slow
def test_a_resumed_run_of_clips_is_the_same_run(pipeline_folder, tmp_path):
    data = write_clips(tmp_path / "data")
    given = settings(pipeline_folder("wan"), data, tmp_path / "whole", resolution=SIZE, num_frames=5, max_train_steps=4)
    train(TrainingArguments(**given))
    parts = given | {"output_dir": str(tmp_path / "parts"), "checkpointing_steps": 2}
    train(TrainingArguments(**parts | {"max_train_steps": 2}))
    train(TrainingArguments(**parts, resume_from_checkpoint="latest"))
    torch.testing.assert_close(adapter_weights(tmp_path / "parts"), adapter_weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"random_flip": True}, {"shuffle_tags": True, "instance_prompt": "a, b"}, {"aspect_ratio_buckets": True}],
)
def test_images_are_clips_of_one_frame(changes, pipeline_folder, tmp_path, capsys):
    given = settings(pipeline_folder("wan"), write_folders(tmp_path / "data"), tmp_path / "adapter", resolution=SIZE)
    train(TrainingArguments(**given, **changes))
    assert "The data are images, and WanPipeline makes videos: each is a clip of one frame." in capsys.readouterr().out
    weights = adapter_weights(tmp_path / "adapter")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if ".causal_context_up" in name)


@pytest.mark.usefixtures("on_cpu")
def test_a_dry_run_shows_the_shape_of_clips(pipeline_folder, tmp_path, capsys):
    data = write_clips(tmp_path / "data")
    given = settings(pipeline_folder("wan"), data, tmp_path / "adapter", resolution=SIZE, num_frames=5)
    train(TrainingArguments(**given, dry_run=True))
    assert "(3, 16, 2, 4, 4)" in capsys.readouterr().out


def test_files_and_folders_of_frames_are_read_alike(tmp_path):
    """Of a file the frames come in its order, of a folder in that of the numbers in their names."""
    write_clips(tmp_path / "frames", frames=4)
    rows = load_folders(tmp_path / "frames", frame_folders=True)
    assert rows.has_videos
    assert rows.counts == {"": 2, "slant": 2, "thick": 2}
    clip = rows.rows[0]["video"]
    assert [path.name for path in frame_files(Path(clip["path"]))] == ["8.png", "9.png", "10.png", "11.png"]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "²1.png").touch()  # no number, though str.isdigit() says so
    assert len(frame_files(tmp_path / "odd")) == 1
    frames = [np.asarray(frame) for frame in first_frames(clip, 4)]
    write_clips(tmp_path / "files", frames=4, files=True)
    clip = load_folders(tmp_path / "files").rows[0]["video"]
    for read, exact in zip(first_frames(clip, 4), frames, strict=True):
        assert np.corrcoef(np.asarray(read).mean(2).ravel(), exact.mean(2).ravel())[0, 1] > 0.5
    in_memory = {"path": None, "bytes": Path(clip["path"]).read_bytes()}
    assert [np.asarray(f).tolist() for f in first_frames(in_memory, 2)] == [
        np.asarray(f).tolist() for f in first_frames(clip, 2)
    ]
    assert not load_folders(tmp_path / "frames").has_videos  # unasked, images are images


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_video_that_players_turn_is_turned(turns, tmp_path):
    """Phones store what was filmed upright on its side, and how players must turn it."""
    file = tmp_path / "clip.mp4"
    shown = Image.new("RGB", (64, 32))
    shown.paste("red", (0, 0, 32, 32))
    save_video([shown], file, 16)
    stored = bytearray(file.read_bytes())
    matrix = stored.index(b"tkhd") + 44
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]  # clockwise, in quarters
    rows = (cosine, sine, 0, -sine, cosine, 0, 0, 0)
    stored[matrix : matrix + 36] = struct.pack(">9i", *(number << 16 for number in rows), 1 << 30)
    file.write_bytes(stored)
    (frame,) = first_frames({"path": str(file), "bytes": None}, 1)
    expected = np.rot90(np.asarray(shown), -turns)
    assert frame.size == expected.shape[1::-1]
    assert np.corrcoef(np.asarray(frame).ravel(), expected.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES.union(VideoFolder.EXTENSIONS)))
def test_videos_that_datasets_knows_are_clips_in_folders(suffix, tmp_path):
    root = write_clips(tmp_path, files=True, clips=1)
    for file in list(root.rglob("*.mp4")):
        file.rename(file.with_suffix(suffix))
    data = load_folders(root)
    assert data.has_videos
    assert data.counts == {"": 1, "slant": 1, "thick": 1}
    assert not check_data(data).errors
    assert count_frames(data.rows[0]["video"]) == len(first_frames(data.rows[0]["video"], 5)) == 5


@pytest.mark.parametrize("name", ["a.mp4", "a", "a.ts"])
def test_videos_are_read_from_wherever_datasets_names_them(name, tmp_path):
    (file, *_) = write_clips(tmp_path, files=True, clips=1).rglob("*.mp4")
    fsspec.filesystem("memory").pipe(f"/{name}", file.read_bytes())
    clip = {"path": f"memory://{name}", "bytes": None}
    assert count_frames(clip) == 5
    exact = first_frames({"path": str(file), "bytes": None}, 5)
    assert [np.asarray(f).tolist() for f in first_frames(clip, 5)] == [np.asarray(f).tolist() for f in exact]


def test_a_folder_is_frames_whatever_its_name(tmp_path):
    root = write_clips(tmp_path, clips=1)
    for folder in root.glob("*/0"):
        folder.rename(folder.with_suffix(".mp4"))
    clip = load_folders(root, frame_folders=True).rows[0]["video"]
    assert count_frames(clip) == len(first_frames(clip, 5)) == 5


def test_dots_are_a_part_of_the_names_of_folders_of_frames(tmp_path):
    root = write_clips(tmp_path, clips=2)
    for folder in [*root.glob("*/*")]:
        folder.rename(folder.with_name(f"scene.{folder.name}"))
        folder.with_name(f"scene.{folder.name}.txt").write_text(f"scene {folder.name}")
    rows = load_folders(root, frame_folders=True, paired_files=True).rows
    assert rows["pair"][:] == ["scene.0", "scene.1"] * 3
    assert rows["caption"][:] == ["scene 0", "scene 1"] * 3


def test_clips_have_captions_beside_them_or_in_metadata(tmp_path):
    root = write_clips(tmp_path / "files", files=True, clips=1)
    for context in ("obs", "slant"):
        (root / context / "0.txt").write_text(f"a {context}")
    (root / "thick" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.mp4", "text": "a thick"}))
    assert sorted(load_folders(root).rows["caption"]) == ["a obs", "a slant", "a thick"]


WRONG = [
    ("wan", {"num_frames": 7}, r"num_frames=7 does not fit WanPipeline.*The nearest allowed: 5 and 9\."),
    ("wan", {"num_frames": 9}, r"6 clips have fewer frames than num_frames=9: .*/obs/0 \(5\).*Lower --num_frames"),
    ("wan", {"resolution": 40}, r"resolution=40 was given, but WanPipeline needs a multiple of 16"),
    ("wan", {"noise_expert": "low"}, "--noise_expert=low: this base has one denoiser only"),
    (
        "wan_2_2",
        {"noise_expert": "low", "gguf_file": __file__},
        "--gguf_file=.* of one denoiser, and this base has two",
    ),
    ("wan_2_2", {}, "has two denoisers, one for high and one for low noise.*--noise_expert high .* or low"),
    ("wan", {"aspect_ratio_buckets": True}, "--aspect_ratio_buckets is for images, and the data holds videos"),
    ("wan", {"reweighted_contexts": ["pairs"]}, "--reweighted_contexts is for images, and WanPipeline makes videos"),
    ("stable_diffusion", {}, "The data holds videos, and StableDiffusionPipeline makes images"),
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("name", "changes", "said"), WRONG)
def test_what_does_not_fit_is_refused(name, changes, said, pipeline_folder, tmp_path):
    given = {"resolution": SIZE, "num_frames": 5} | changes
    given = settings(pipeline_folder(name), write_clips(tmp_path / "data"), tmp_path / "adapter", **given)
    with pytest.raises(ValueError, match=said):
        train(TrainingArguments(**given))
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.usefixtures("on_cpu")
def test_images_are_refused_as_long_clips(pipeline_folder, tmp_path):
    images = write_folders(tmp_path / "images")
    given = settings(pipeline_folder("wan"), images, tmp_path / "adapter", resolution=SIZE, num_frames=5)
    with pytest.raises(ValueError, match="--num_frames=5, but the data are images, which are clips of 1 frame"):
        train(TrainingArguments(**given))


def test_without_pyav_videos_are_refused_and_say_what_to_install(tmp_path, monkeypatch):
    root = write_clips(tmp_path, files=True)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"Video files need PyAV.*pip install .*\[video\]"):
        load_folders(root)


@pytest.mark.parametrize("files", [False, True])
def test_a_contact_sheet_shows_first_frames(files, tmp_path):
    white, black = (Image.new("RGB", (32, 32), color) for color in ("white", "black"))
    root, sheet = write_clips(tmp_path / "clips", files=files, contexts=("obs", "thick")), tmp_path / "check.png"
    for number in range(2):
        clip = root / "obs" / str(number)
        if files:
            save_video([black, white, white], clip.with_suffix(".mp4"), 16)
        else:
            black.save(clip / "8.png")
    options = {"train_data_dir": root, "num_frames": 3, "contact_sheet": sheet}
    assert main(command("check-data", options)) == 0
    with Image.open(sheet) as grid:
        assert max(grid.getpixel((grid.width - 4 - 64, 4 + 64))) < 5  # in the row of the observational context


@pytest.mark.usefixtures("on_cpu")
def test_an_autoencoder_refuses_videos(tmp_path, capsys):
    root = write_clips(tmp_path / "clips")
    options = {"train_data_dir": root, "num_frames": 5, "output_dir": tmp_path / "autoencoder"}
    assert main(command("train-autoencoder", options)) == 1
    assert "An autoencoder is trained on images, and the data holds videos. Give images" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    root = write_clips(tmp_path, files=True)
    (root / "obs" / "0.mp4").write_bytes(b"no video")
    write_clips(root, clips=1)
    damaged = root / "obs" / "0" / "11.png"  # not the first frame
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert main(["check-data", "--train_data_dir", str(root), "--num_frames", "5"]) == 1
    said = capsys.readouterr().out
    assert "2 videos cannot be read" in said
    assert "obs/0.mp4 (InvalidDataError)" in said
    assert "obs/0 (OSError)" in said


@pytest.mark.usefixtures("on_cpu")
def test_frames_that_a_training_does_not_read_are_not_decoded(pipeline_folder, tmp_path, capsys):
    root = write_clips(tmp_path / "data", frames=6)
    (root / "obs" / "0" / "13.png").write_bytes(b"no image")  # the last frame
    assert not check_data(load_folders(root, frame_folders=True)).errors
    assert main(command("check-data", {"train_data_dir": root, "num_frames": 5})) == 0
    assert main(command("check-data", {"train_data_dir": root, "num_frames": 6})) == 1
    assert "1 videos cannot be read" in capsys.readouterr().out
    given = settings(pipeline_folder("wan"), root, tmp_path / "adapter", resolution=SIZE, num_frames=5)
    train(TrainingArguments(**given, dry_run=True))
    (root / "obs" / "0" / "12.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 videos cannot be read: .*/obs/0 \("):
        train(TrainingArguments(**given, dry_run=True))


def test_other_files_among_frames_are_refused(tmp_path):
    root = write_clips(tmp_path)
    (root / "obs" / "0" / "caption.txt").write_text("a disc")
    with pytest.raises(ValueError, match=r"obs/0/caption\.txt' lies among the frames.*beside its folder, as '0\.txt'"):
        load_folders(root, frame_folders=True)


def test_edits_and_frames_are_refused_where_they_make_no_sense():
    base = as_base(wan_2_2())
    with pytest.raises(ValueError, match="counterfactual is for images, and WanPipeline makes videos"):
        counterfactual(base, torch.rand(1, 3, SIZE, SIZE), "thick")
    with pytest.raises(ValueError, match="num_frames=5 was given, but StableDiffusion3Pipeline makes images"):
        generate(stable_diffusion_3(), [()], seeds=[0], num_frames=5)


def test_an_adapter_of_low_noise_is_not_loaded_where_there_is_no_such_denoiser(pipeline_folder, tmp_path):
    base = load_base(pipeline_folder("wan_2_2"))
    base.use_denoiser("transformer_2")
    config = CausalContextConfig(concepts=("thick",), component="transformer_2")
    get_peft_model(base.denoiser, config).save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("wan"))
    file = tmp_path / "adapter_config.json"
    for changes in ({}, {"auto_mapping": None}):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ValueError, match="needs a component 'transformer_2', which WanPipeline does not have"):
            load_context_adapter(pipe, tmp_path)


@pytest.mark.slow
def test_adapters_of_two_denoisers_are_loaded_together_and_saved_as_one(pipeline_folder, tmp_path):
    for name in ("transformer", "transformer_2"):
        base = load_base(pipeline_folder("wan_2_2"))
        base.use_denoiser(name)
        config = CausalContextConfig(concepts=("thick",), component=name, init_weights=False)
        model = get_peft_model(base.denoiser, config)
        config.base_model_name_or_path = pipeline_folder("wan_2_2")
        model.save_pretrained(tmp_path / name)

    def clip(pipe):
        return generate(pipe, ["thick"], seeds=[0], resolution=SIZE, num_frames=5, num_inference_steps=4)[0]

    clips = []
    for number, names in enumerate([("transformer_2",), ("transformer",), ("transformer", "transformer_2")]):
        pipe = CausalContextPipeline.from_pretrained(tmp_path / names[0])
        for name in names[1:]:
            load_context_adapter(pipe, tmp_path / name)
        pipe.save_pretrained(tmp_path / str(number))
        clips.append(clip(pipe))
        torch.testing.assert_close(clip(CausalContextPipeline.from_pretrained(tmp_path / str(number))), clips[-1])
    assert all((a - b).abs().max() > 1e-5 for a, b in combinations(clips, 2))

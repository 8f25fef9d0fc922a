"""The command line: `companion …` or `python -m companion …`.

Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

import io
import json as json_module
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.errors import CompanionError

if TYPE_CHECKING:
    from torch import Tensor

    from companion import detect as detection
    from companion.train import Epoch, Scores

# typer's defaults print errors as usage and a box, and import rich for every --help.
_OPTIONS: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(help="Make neural networks smaller and faster, and measure it.", **_OPTIONS)
data_app = typer.Typer(help="List, download and check the data.", **_OPTIONS)
app.add_typer(data_app, name="data")

Data = Annotated[str, typer.Option(help="A name of `companion data list`, or folder:PATH for images of your own.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; all cores if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a CUDA GPU if there is one.")]
Workers = Annotated[int, typer.Option(min=0, max=64, help="Processes that read samples ahead.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, or on a GPU fp16 and tf32.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


INTERRUPTED = 130  # as shells report Ctrl-C


class _Interrupted(Exception):
    """Ctrl-C, with what to do next."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit code 0, or one sentence on stderr and 1 (unusable input) or 2 (wrong usage)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class called 猫 on a terminal that knows ASCII
    try:
        code = app(args=arguments or ["--help"], prog_name="companion", standalone_mode=False)
        if code != INTERRUPTED:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk shows here, not when Python ends
            sys.exit(code or 0)
        message = "interrupted."
    except _Interrupted as error:
        message, code = str(error), INTERRUPTED
    except typer.Abort:
        message, code = "the input ended.", 1
    except CompanionError as error:
        message, code = str(error), 1
    except OSError as error:
        message, code = f"{error.filename or 'output'}: {error.strerror or error}.", 1
        sys.stdout = None  # or Python would complain once more about what it still holds
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`." if context else "."
        message, code = error.format_message().rstrip(".?") + hint, error.exit_code
    # A file name may hold line breaks or what a terminal takes for a command.
    print("companion:", _printable(message), file=sys.stderr)
    sys.exit(code)


def _printable(text: str) -> str:
    """Without what a terminal takes for a command."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@app.command()
def doctor(json: Json = False) -> None:
    """What is installed and works here, and what to type about the rest."""
    from companion.doctor import report

    found = report()
    if json:
        print(json_module.dumps(found, indent=2))
        return
    cpu = found["cpu"]
    print(f"companion {found['companion']}, Python {found['python']}, {found['system']}")
    print(
        f"CPU           {cpu['model'] or 'unknown'}, {cpu['cores']} cores, {found['threads'] or '?'} threads in torch"
    )
    print(f"              {' '.join(cpu['features']) or 'features unknown'}")
    print(f"accelerators  {', '.join(found['accelerators']) or 'none: everything runs on the CPU'}")
    print(f"precisions    {'; '.join(f'{name}: {state}' for name, state in found['precisions'].items())}")
    _table(
        ("part", "state", "", "to get it"),
        ((part["name"], part["state"], part["detail"], part["advice"]) for part in found["parts"]),
    )


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="simple_cnn, cifar_resnet20, text_classifier, …")],
    data: Data = "digits",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training data; 10, of a detector 25, if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step, of each worker.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate; several workers take so many times as much.")] = 3e-3,
    precision: Precision = "fp32",
    accumulate: Annotated[int, typer.Option(min=1, help="Parts to compute a step in, to take less memory.")] = 1,
    clip_norm: Annotated[float | None, typer.Option(help="Shorten gradients that are longer than this.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the initial weights and of every random draw.")
    ] = 0,
    threads: Threads = None,
    device: Device = None,
    workers: Workers = 0,
    distributed: Annotated[
        str | None,
        typer.Option(help="ddp or horovod: this is one of the workers that torchrun or horovodrun started."),
    ] = None,
    gradient_compression: Annotated[
        str, typer.Option(help="none, or fp16: what gradients are between workers.")
    ] = "none",
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="Batch normalisation over the images of all workers.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Weights file; MODEL-DATA.safetensors if not given.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of these settings, if there is one.")
    ] = False,
) -> None:
    """Train a network, judge it on the test split, and save its weights.

    While it runs, its state is kept in OUT.checkpoint: a run that was interrupted or killed goes on with --resume and
    ends with the same weights.
    """
    from companion import datasets, files, metrics, models
    from companion import train as training

    options = _suited(data, models.task(model), models.image_size(model))
    _set_threads(threads)
    with training.joined(distributed, compression=gradient_compression) as joined:

        def say(text: str) -> None:
            if joined.rank == 0:
                print(text, flush=True)

        train_data, test_data = (datasets.load(data, split=split, **options) for split in ("train", "test"))
        # Its own validation split if it has one, else the share that fit holds out by itself.
        own_split: dict[str, Any] = (
            {"validation": datasets.load(data, split="val")} if "val" in datasets.splits(data) else {}
        )
        words = {"vocabulary": getattr(train_data, "vocabulary", None)} if models.task(model) == "text" else {}
        network = models.create(model, labels=train_data.labels, classes=len(train_data.labels), seed=seed, **words)
        own = Path(data.removeprefix("folder:")).resolve().name.removesuffix(".zip")
        out = out or Path(f"{model}-{own if data.startswith('folder:') else data}.safetensors")
        if joined.rank == 0:
            files.check_writable(out)
        checkpoint = out.with_name(out.name + ".checkpoint")
        if resume and not checkpoint.exists():
            say(f"there is no unfinished run in {checkpoint}: starting from the beginning")
        if out.exists():
            say(f"{out} exists: it will be replaced when this run is done")
        size = f"{metrics.count_parameters(network):,} parameters"
        say(f"{model} ({size}) on {data} ({len(train_data):,} {_samples(train_data)})")
        if advice := training.Precision.named(precision, device).advice:
            say(advice)
        if joined.size > 1:
            say(f"{joined.size} workers ({joined.name})")
        try:
            history = training.fit(
                network,
                train_data,
                epochs=epochs or training.task_of(train_data).epochs,
                batch_size=batch_size,
                lr=lr,
                precision=precision,
                accumulate=accumulate,
                clip_norm=clip_norm,
                seed=seed,
                device=device,
                num_workers=workers,
                checkpoint=checkpoint,
                resume=resume,
                on_epoch=lambda epoch: say(_epoch(epoch)),
                workers=joined,
                sync_batch_norm=sync_batch_norm,
                **own_split,
            )
        except KeyboardInterrupt:
            hint = "the same command with --resume goes on" if checkpoint.exists() else "nothing was kept yet"
            raise _Interrupted(f"interrupted; {hint}.") from None
        if joined.rank == 0:
            models.save(network, out)
            checkpoint.unlink(missing_ok=True)
        with joined.losses():
            joined.share(None)  # nobody goes on before it is saved
        say(f"weights of epoch {history.best_epoch} (best on the validation split) in {out}")
        try:
            scores = training.evaluate(
                network, test_data, precision=precision, device=device, num_workers=workers, workers=joined
            )
        except training.WorkersLost as error:
            raise CompanionError(
                f"{out} is saved, and was not judged, for a worker was lost: "
                f"`companion evaluate {out} --data {data}` does it."
            ) from error
        say(f"test  {_figures(scores, test_data)}")


@app.command()
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="F.safetensors of `companion train`, or F.onnx or F.tflite of `companion export`."
        ),
    ],
    data: Data = "digits",
    split: Annotated[str, typer.Option(help="test or train; of camvid also val.")] = "test",
    engine: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime, openvino, litert, torch, torch_fused, …; if not given torch for F.safetensors, "
            "onnxruntime for F.onnx, litert for F.tflite."
        ),
    ] = None,
    precision: Precision = "fp32",
    threads: Threads = None,
    device: Device = None,
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Judge a trained network on a data set, run by torch or by an inference engine."""
    from companion import datasets, models
    from companion import train as training

    _set_threads(threads)
    if engine is None and path.suffix.lower() not in (".onnx", ".tflite"):
        network = models.load(path)
        info = models.describe(network)
        name, size = info.name, info.configuration.get("image_size", models.image_size(info.name))
        task: str | None = info.task
        vocabulary = info.vocabulary
    else:
        if precision != "fp32" or device is not None:
            raise CompanionError("an engine computes as its file says, on the CPU: leave out --precision and --device.")
        from companion import engines

        runs = engines.load(path, engine or engines.suited(path), threads=threads or 1)
        network, device = engines.as_module(runs), "cpu"
        name = f"{runs.metadata.model or path.name} by {runs.name}"
        task, size = runs.metadata.task, runs.inputs[0].shape[-1] or (runs.metadata.input_size or (None,))[-1]
        vocabulary = runs.metadata.vocabulary
    samples = datasets.load(data, split=split, **_suited(data, task, size, vocabulary))
    scores = training.evaluate(network, samples, precision=precision, device=device, num_workers=workers)
    if json:
        found = {"model": name, "data": data, "split": split, "samples": scores.samples}
        # JSON has no word for a loss that is not finite.
        found["loss"] = scores.loss if math.isfinite(scores.loss) else None
        print(json_module.dumps(found | scores.metrics, allow_nan=False))
    else:
        print(f"{name} on {data} ({split})  {_figures(scores, samples)}")


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(metavar="F.safetensors", help="Weights written by `companion train`.")],
    out: Annotated[Path, typer.Argument(metavar="F.onnx", help="The file to write; or F.tflite, for LiteRT.")],
    precision: Annotated[str, typer.Option(help="fp32, or fp16 for half the size.")] = "fp32",
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Images of any size that suits the network.")
    ] = False,
) -> None:
    """Write a trained network as an ONNX file, which any engine runs, or as a LiteRT file.

    Weights, class names and the network's description are inside; batches may have any size. The file is there only if
    ONNX Runtime (LiteRT) gives the same answers with it as torch. LiteRT files need the converter litert-torch.
    """
    from companion import engines, files, models
    from companion.units import format_bytes

    if out.suffix not in (".onnx", ".tflite"):
        raise CompanionError(f"{out} must end in .onnx or .tflite.")
    if out.suffix == ".tflite" and (precision != "fp32" or dynamic_size):
        raise CompanionError("--precision and --dynamic-size are for .onnx files: leave them out.")
    files.check_writable(out)
    network = models.load(weights)
    example = engines.example_for(network)
    if out.suffix == ".tflite":
        written = engines.export_tflite(network, example, out)
    else:
        written = engines.export_onnx(network, example, out, precision=precision, dynamic_size=dynamic_size)
    print(f"{out}: {format_bytes(written.bytes)}, at most {written.largest_difference:.1e} from torch's outputs")


@app.command()
def build(
    source: Annotated[Path, typer.Argument(metavar="F.onnx", help="A network, as `companion export` writes it.")],
    out: Annotated[Path, typer.Argument(metavar="F.engine", help="The file to write.")],
    precision: Annotated[str, typer.Option(help="fp32 (as the file says; int8 stays int8), tf32 or fp16.")] = "fp32",
    batch: Annotated[
        str, typer.Option(metavar="MIN,USUAL,MAX", help="Numbers of samples it takes, and the one to be fast at.")
    ] = "1,4,16",
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="NAME=MIN:USUAL:MAX", help="Shapes of an input of any size: images=1x3x320x320:…:…"
        ),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most GPU memory for scratch, such as 256MiB.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="8.6", help="Compute capability to build for; TensorRT for RTX only.")
    ] = None,
) -> None:
    """Build a TensorRT engine from an ONNX file.

    TensorRT for RTX builds without a GPU; TensorRT builds for the GPU that is here. An engine runs on that kind of GPU,
    with that version of the library, and nowhere else.
    """
    from time import perf_counter

    from companion import files
    from companion.engines import tensorrt
    from companion.units import format_bytes, parse_bytes

    if out.suffix != ".engine":
        raise CompanionError(f"{out} must end in .engine.")
    if source.suffix != ".onnx":
        raise CompanionError(f"{source} must end in .onnx: `companion export` makes such a file.")
    files.check_writable(out)
    sizes = _whole_numbers("--batch", batch, ",")
    profile = dict(_input_shapes(text) for text in shapes or ())
    limit = None if workspace is None else parse_bytes(workspace)
    began = perf_counter()
    try:
        made = tensorrt.build(
            source,
            precision=precision,
            batch=sizes,
            profiles=[profile] if profile else [],
            workspace=limit,
            target=target,
        )
        seconds = perf_counter() - began
        size = made.write(out)
    except KeyboardInterrupt:
        raise _Interrupted("interrupted; nothing was written.") from None
    print(
        f"{out}: {format_bytes(size)}, {made.precision}, {made.layers} layers before fusion, built in {seconds:.1f} s"
    )
    print(f"by {made.library} {made.version}, for {'any GPU it supports' if made.device == 'none' else made.device}")
    for each in made.profiles:
        for name, (low, usual, high) in each.items():
            print(_printable(f"{name}: {list(low)} to {list(high)}, fastest at {list(usual)}"))


def _whole_numbers(what: str, text: str, separator: str) -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise CompanionError(f"{what} is {text!r}: give whole numbers with {separator!r} between them.") from None


def _input_shapes(text: str) -> tuple[str, list[list[int]]]:
    """``images=1x3x64x64:…:…`` as a name and its shapes."""
    name, equals, shapes = text.rpartition("=")
    if not equals:
        raise CompanionError(f"--input is {text!r}: give NAME=MIN:USUAL:MAX, shapes such as 1x3x320x320.")
    return name, [_whole_numbers("--input", shape, "x") for shape in shapes.split(":")]


@app.command()
def compress(
    weights: Annotated[Path, typer.Argument(metavar="F.safetensors", help="Weights written by `companion train`.")],
    steps: Annotated[
        str | None,
        typer.Option(
            help="One after another: prune=0.5,low_rank=0.7,sparsify=0.8,distill=T.safetensors,quantize=int8."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Or try a few steps and keep the best that meets this: latency=0.5,bytes=0.25,macs=0.5,points=1."
        ),
    ] = None,
    data: Data = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data after each step.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    precision: Precision = "fp32",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every random draw.")] = 0,
    threads: Threads = None,
    device: Device = None,
    workers: Workers = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="G", help="Writes G.safetensors and G.onnx; F-compressed if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a trained network smaller and faster, and say what each step gained and cost.

    prune and low_rank leave that share of the multiply-adds, sparsify makes that share of the weights zero, distill
    trains with a teacher, quantize writes int8. Every stage is judged on the test split as the ONNX file that ONNX
    Runtime runs, and timed with a batch of 32 on one thread. What meets a target is chosen by a tenth of the training
    data, held out; at the end it says whether the test split agrees (with --json: "missed" is empty).
    """
    from companion import compress as compression
    from companion import datasets, files, models

    if (steps is None) == (target is None):
        raise CompanionError("give either --steps or --target.")
    chosen = None if steps is None else compression.parse_steps(steps)
    wanted = None if target is None else compression.parse_target(target)
    out = out or weights.with_name(f"{weights.stem}-compressed")
    if out.suffix in (".safetensors", ".onnx"):
        out = out.with_suffix("")
    written = [out.with_name(f"{out.name}{suffix}") for suffix in (".safetensors", ".onnx")]
    needed = [weights, *(step.setting for step in chosen or () if isinstance(step.setting, Path))]
    for path in written:
        if path.resolve() in [each.resolve() for each in needed]:
            raise CompanionError(f"{path} is read, so it cannot be written: give another --out.")
        files.check_writable(path)
    network = models.load(weights)
    info = models.describe(network)
    size = info.configuration.get("image_size", models.image_size(info.name))
    options = _suited(data, info.task, size, info.vocabulary)
    _set_threads(threads)
    train_data, test_data = (datasets.load(data, split=split, **options) for split in ("train", "test"))
    settings: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "precision": precision,
        "seed": seed,
        "device": device,
        "num_workers": workers,
    }
    if wanted is not None:
        search = compression.search(network, wanted, train_data, **settings)
        if not json:
            print(f"tried, judged on a tenth of the training data:\n\n{search}\n")
        if search.best is None:
            raise CompanionError(f"none of the steps tried meets {target}: ask for less, or give --steps of your own.")
        chosen = search.best
    assert chosen is not None
    found = compression.apply_steps(network, chosen, train_data, test_data, onnx=written[1], **settings)
    models.save(found.model, written[0])
    missed = {} if wanted is None else wanted.missed(found.stages[-1], found.stages[0])
    if json:
        more = {} if wanted is None else {"search": search.to_json(), "missed": missed}
        print(json_module.dumps(found.to_json() | more, allow_nan=False))
        return
    print(found)
    if missed:
        print(f"{target} is missed on the test data: " + ", ".join(f"{name}={has:.4g}" for name, has in missed.items()))
    elif wanted is not None:
        print(f"{target} is met on the test data")
    print(f"written to {written[0]} (before quantisation) and {written[1]}")


@app.command()
def profile(
    target: Annotated[
        str, typer.Argument(metavar="MODEL_OR_FILE", help="simple_cnn, F.safetensors, F.onnx, torchvision:resnet50, …")
    ],
    shape: Annotated[
        str | None, typer.Option("--input", metavar="N,C,H,W", help="Shape of the example; one sample if not given.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of the timing.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, max=3600, help="How long to time.")] = 1.0,
    modules: Annotated[bool, typer.Option("--modules", help="A line for each module, too.")] = False,
    json: Json = False,
) -> None:
    """What a network costs: parameters, MACs, FLOPs, memory, size, latency."""
    from companion import profile as profiling

    try:
        sizes = None if shape is None else tuple(int(size) for size in shape.split(","))
    except ValueError:
        raise CompanionError(f"--input is {shape!r}: give whole numbers such as 1,3,32,32.") from None
    found = profiling.profile(target, input=sizes, threads=threads, seconds=seconds)
    if json:
        print(json_module.dumps(profiling.to_json(found), allow_nan=False))
        return
    first, *rest = profiling.to_rows(found)
    _table(first, rest)
    if modules:
        print()
        _table(("module", "MACs", "share", "bytes moved"), profiling.module_rows(found))


@app.command()
def detect(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE_OR_VIDEO", help="An image, a folder of images, a video, or camera:0.")
    ],
    model: Annotated[Path, typer.Option(metavar="F.onnx", help="A YOLOv5, as its own export writes it.")],
    engine: Annotated[
        str | None, typer.Option(help="Runs it: onnxruntime, …; what suits the file if not given.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0, max=1, help="The lowest score shown.")] = 0.25,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Above it two boxes of a class are one object.")] = 0.45,
    agnostic: Annotated[bool, typer.Option("--agnostic", help="So are two boxes of different classes.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Pictures with what was found: a folder for images, an .mp4 or .avi file for a video; Ctrl-C keeps it."
        ),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="A clip at its frame rate: what comes too late is dropped and counted.")
    ] = False,
    json: Json = False,
) -> None:
    """Find objects in images, a video (.mp4, .avi, .mov, .mkv, .webm), or what a camera sees.

    Boxes are in pixels of the image: left, top, right, bottom. With --json images give one list; a video gives one
    object a line for each frame, and the summary on stderr.
    """
    from companion import detect as detection
    from companion import engines

    if detection.is_video(source) and not source.is_dir():
        if out is not None and out.resolve() == source.resolve():
            raise CompanionError(f"{out} is the video itself: give another --out.")
        with engines.load(model, engine or engines.suited(model), threads=threads) as runs:
            detector = detection.Detector(runs, confidence=confidence, overlap=overlap, agnostic=agnostic)
            _detect_in_video(source, detector, out, realtime, json)
        return
    if realtime:
        raise CompanionError("--realtime is for videos: leave it out for images.")
    paths = _images(source)
    if out is not None:
        if out.is_file():
            raise CompanionError(f"{out} is a file: name a folder for the images.")
        if out.resolve() == (source if source.is_dir() else source.parent).resolve():
            raise CompanionError(f"{out} holds the images themselves: give another --out.")
        if out.resolve().is_relative_to(source.resolve()):  # with what was drawn the last time
            paths = [path for path in paths if not path.resolve().is_relative_to(out.resolve())]
    with engines.load(model, engine or engines.suited(model), threads=threads) as runs:
        detector = detection.Detector(runs, confidence=confidence, overlap=overlap, agnostic=agnostic)
        _detect_in_images(source, paths, detector, out, json)


def _images(source: Path) -> list[Path]:
    from companion.datasets.images import Folder

    if not source.exists():
        raise CompanionError(f"there is no image or folder {source}.")
    paths = [source / name for name in sorted(Folder(source).files())] if source.is_dir() else [source]
    if not paths:
        raise CompanionError(f"{source} holds no images: put JPEG, PNG, WebP, BMP or GIF files there.")
    return paths


def _detect_in_images(
    source: Path, paths: Iterable[Path], detector: "detection.Detector", out: Path | None, json: bool
) -> None:
    from companion import detect as detection
    from companion import files

    rows, unread = [], []
    for path in paths:
        try:
            image = detection.read_image(path)
        except CompanionError as error:
            if not source.is_dir():
                raise
            unread.append(error)  # the others of a folder are looked at
            continue
        found = detector(image)
        rows.append({"image": str(path), "detections": found.to_json()})
        if out is not None:
            inside = path.relative_to(source) if source.is_dir() else Path(path.name)
            target = out / inside.with_name(f"{inside.name}.png")  # a.jpg.png beside a.png.png
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(target) as file:
                detection.draw(image, found).save(file, "PNG")
        if not json:
            print(_printable(f"{path}: {_objects(found)}"))
            for each in found.to_json():
                corners = " ".join(f"{value:6.0f}" for value in each["box"])
                print(f"  {each['score']:.2f}  {corners}  {_printable(each['label'])}")
    if json:
        print(json_module.dumps(rows))
    if unread:
        more = f" ({len(unread) - 1} more could not be read)" if len(unread) > 1 else ""
        raise CompanionError(f"{str(unread[0]).removesuffix('.')}{more}.")


def _detect_in_video(
    source: Path, detector: "detection.Detector", out: Path | None, realtime: bool, json: bool
) -> None:
    from companion import detect as detection

    def show(frame: detection.Frame, found: detection.Detections) -> None:
        if json:
            place = {"image": str(source), "frame": frame.number, "time": round(frame.time, 6)}
            line = json_module.dumps(place | {"detections": found.to_json()})
        else:
            names = ", ".join(f"{each['label']} {each['score']:.2f}" for each in found.to_json())
            line = _printable(f"frame {frame.number:5}  {frame.time:8.3f} s  {_objects(found)}  {names}".rstrip())
        print(line, flush=True)  # a camera is watched while it runs

    report = detection.watch(source, detector, out=out, on_frame=show, realtime=realtime)
    for line in str(report).splitlines():
        print(_printable(line), file=sys.stderr if json else sys.stdout)
    if report.interrupted:
        kept = f"{out} holds the frames until then" if out else "the frames until then are above"
        raise _Interrupted(f"interrupted; {kept}.")


def _objects(found: "detection.Detections") -> str:
    return f"{len(found)} {'object' if len(found) == 1 else 'objects'}"


@app.command()
def serve(
    kind: Annotated[str, typer.Argument(metavar="image|text", help="What clients send.")],
    model: Annotated[list[str], typer.Option(metavar="[NAME=]F", help="A .safetensors or .onnx file, or several.")],
    engine: Annotated[str | None, typer.Option(help="torch_fused, onnxruntime, …; the usual one if not given.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets everybody in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    policy: Annotated[str | None, typer.Option(help="idle, fixed or hold: when a batch begins.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Items in a call of the model; 32 if not given.")] = None,
    max_wait_ms: Annotated[float | None, typer.Option(help="Bounds fixed and hold; 2 if not given.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Items that may wait; 1024 if not given.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes, on one port.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each; 1 if not given.")] = None,
    grace: Annotated[float | None, typer.Option(help="Seconds at the end for what was accepted; 30.")] = None,
    reload: Annotated[bool | None, typer.Option("--reload", help="Load a file again when it changes.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Its first line is the bearer token to ask for.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error; info if not given.")] = None,
) -> None:
    """Answer HTTP requests with networks, in batches; a page to try them is at /.

    The first model is asked at /predict, each at /predict/NAME. SIGHUP loads the files again.

    Further settings come from environment variables, such as the bearer token from COMPANION_SERVE_TOKEN.
    """
    from companion.serve import main as serving
    from companion.serve.models import named
    from companion.serve.settings import settings_from

    if kind not in serving.APPS:
        raise CompanionError(f"there is no server for {kind!r}: choose {' or '.join(serving.APPS)}.")
    settings = settings_from(
        policy=policy,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        threads=threads,
        grace=grace,
        reload=reload,
        token_file=token_file,
        log_level=log_level,
    )
    models = named(model)

    def announce(address: str) -> None:
        paths = ["/predict", *(f"/predict/{name}" for name in list(models)[1:])]
        places = [f"{file} at {address}{path}" for file, path in zip(models.values(), paths, strict=True)]
        print(f"{', '.join(places)}; Ctrl-C ends it", flush=True)

    serving.run(
        kind,
        models,
        engine=engine,
        host=host,
        port=port,
        workers=workers,
        settings=settings,
        announce=announce,
    )


@app.command()
def load(
    url: Annotated[str, typer.Argument(metavar="URL", help="http://127.0.0.1:8000/predict")],
    concurrency: Annotated[int | None, typer.Option(help="Clients that ask again when answered; 32.")] = None,
    rate: Annotated[float | None, typer.Option(help="In place of these, requests a second that come anyway.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to send.")] = 10.0,
    data: Data = "digits",
    token: Annotated[str | None, typer.Option(envvar="COMPANION_SERVE_TOKEN", help="Bearer token.")] = None,
    json: Json = False,
) -> None:
    """Put a server of images or texts under load, and check its answers.

    Each of 64 samples is sent alone first; what comes back then is the right answer.
    """
    from companion import datasets
    from companion.serve.load import Request, alone
    from companion.serve.load import load as put

    if concurrency is not None and rate is not None:
        raise CompanionError("give either --concurrency or --rate.")
    samples = datasets.load(data, split="test")
    chosen = range(min(64, len(samples)))
    if isinstance(samples, datasets.Texts):
        bodies = [json_module.dumps({"texts": [samples.texts[i]]}).encode() for i in chosen]
        kind = "application/json"
    else:
        bodies, kind = [_png(samples[i][0]) for i in chosen], "image/png"
    requests = [Request(body, kind) for body in bodies]
    if concurrency is None and rate is None:
        concurrency = 32
    requests = alone(url, requests, token=token)
    found = put(url, requests, concurrency=concurrency, rate=rate, seconds=seconds, token=token).to_json()
    if json:
        print(json_module.dumps(found))
        return
    print(
        f"{found['answers']:,} right answers in {found['seconds']:.1f} s, {found['requests_per_second']:.0f} a second"
    )
    for name, value in (found["latency_ms"] or {}).items():
        print(f"{name:>6} {value:9.2f} ms")
    for why, times in found["failures"].items():
        print(f"{why}: {times:,}")
    if found["failures"]:
        raise CompanionError(f"{sum(found['failures'].values()):,} requests had no right answer.")


def _png(image: "Tensor") -> bytes:
    """A float image [3, H, W] in 0..1 as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which; without it, the list of them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file; NAME.json if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
) -> None:
    """Measure again what the site's tables show, and write the results file.

    A bench that was stopped goes on where it was with the same command.
    """
    from companion import bench as benches
    from companion.metrics import results

    if name is None:
        _table(("bench", "measures"), ((each, benches.get(each).description) for each in benches.names()))
        return
    chosen = benches.get(name)
    out = out or Path(f"{name}.json")
    try:
        yours = benches.run(chosen, out=out, fresh=fresh)
    except KeyboardInterrupt as error:
        raise _Interrupted(str(error) or "interrupted.") from None
    print(yours.to_markdown(), end="")
    print(f"\nwritten to {out}")
    try:
        ours = results.load(name)
    except CompanionError:  # a bench that has no published record yet
        return
    if ours != yours:
        print(f"\nagainst the published figures:\n\n{results.compare(ours, yours).to_markdown()}", end="")


@data_app.command("list")
def data_list() -> None:
    """The data sets, where they come from, and whether they are here."""
    from companion import datasets

    _table(
        ("name", "task", "state", "size", "terms", "source"),
        ((row.name, row.task, row.state, row.size, row.terms, row.source) for row in datasets.catalogue()),
    )
    print(f"\ndownloads and data of your own: {datasets.data_folder()} (COMPANION_DATA chooses another folder)")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `companion data list`.")],
    url: Annotated[str | None, typer.Option(help="Another place that has the same file, such as a mirror.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte before giving up.")] = 30.0,
) -> None:
    """Download a data set; its checksum is verified before anything is kept."""
    from companion import datasets

    print(f"{name} is in {datasets.get(name, url=url, timeout=timeout)}")


@data_app.command("verify")
def data_verify() -> None:
    """Check what is shipped, generated and downloaded against the checksums."""
    from companion import datasets

    rows = datasets.verify()
    _table(("what", "state", ""), ((row.what, "ok" if row.ok else "WRONG", row.message) for row in rows))
    if not all(row.ok for row in rows):
        raise CompanionError("some data are not what they should be; see the lines marked WRONG.")


def _suited(data: str, task: str | None, size: int | None, vocabulary: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Options of a data set that can be made for more than one network."""
    if data in ("docstrings", "ag_news"):
        return {"vocabulary": vocabulary}
    if data.startswith("folder:") and size is not None:
        return {"size": size}
    if data == "digit_scenes" and task is None:
        raise CompanionError("the file does not say whether it segments or detects: export it with companion.")
    return {"task": task} if data == "digit_scenes" and task == "detect" else {}


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _epoch(epoch: "Epoch") -> str:
    score = "" if epoch.validation_score is None else f"   validation {100 * epoch.validation_score:5.1f} %"
    return f"epoch {epoch.epoch:3}   loss {epoch.train_loss:7.4f}{score}   {epoch.seconds:6.1f} s"


def _samples(data: Any) -> str:
    return "texts" if data.task == "text" else "images"


def _figures(scores: "Scores", data: Any) -> str:
    figures = [f"{name} {100 * value:.2f} %" for name, value in scores.metrics.items()]
    loss = [] if math.isnan(scores.loss) else [f"loss {scores.loss:.4f}"]
    return ", ".join([*figures, *loss, f"{scores.samples:,} {_samples(data)}"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from companion.units import format_table

    print(format_table([columns, *rows]))

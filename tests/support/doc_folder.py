"""Makes the folder in which a reader goes through a page: files to ask about, and models in the cache of the hub."""

from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parents[2]
TINY = ROOT / "internvl_rt" / "tiny"


def make_folder(folder: Path, models: set[str]) -> None:
    """Makes what a reader has: files to ask about, links as in a checkout, and models in the cache of the hub.

    models: names of OpenGVLab's, each of which is the tiny checkpoint here.
    """
    (folder / "page.png").symlink_to(TINY / "samples" / "4719.png")
    (folder / "program.py").write_text('import internvl_rt\n\ninternvl_rt.Engine.from_pretrained("tiny")\n')
    with av.open(folder / "clip.mp4", "w") as output:
        stream = output.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    for name in ("deploy", "examples", "internvl_rt"):
        (folder / name).symlink_to(ROOT / name)
    for model in models:
        cached, revision = folder / "hub" / f"models--OpenGVLab--{model}", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(revision)
        (cached / "snapshots" / revision).mkdir(parents=True)
        for file in filter(Path.is_file, TINY.iterdir()):
            (cached / "snapshots" / revision / file.name).symlink_to(file)
    (folder / ".curlrc").write_text("fail-with-body\nno-progress-meter\n")

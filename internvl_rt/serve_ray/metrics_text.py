"""Joins the metrics of several replicas, each in Prometheus' text format, and says of each number whose it is."""

import re
from collections.abc import Mapping

_SAMPLE = re.compile(rb"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (.*)$")


def join_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Returns one text in which each sample has the label `replica`. texts: of each replica, by its name."""
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}  # comments and samples, by the family's name
    for replica, text in sorted(texts.items()):
        label, family = b'replica="' + replica.encode() + b'"', b""
        for line in text.splitlines():
            if line.startswith(b"# "):
                family = line.split(b" ", 3)[2]
                comments, _ = families.setdefault(family, ([], []))
                if line not in comments:
                    comments.append(line)
            elif found := _SAMPLE.match(line):
                name, labels, value = found.groups()
                inside = label + b"," + labels if labels else label
                families.setdefault(family, ([], []))[1].append(name + b"{" + inside + b"} " + value)
    return b"".join(b"\n".join([*comments, *samples]) + b"\n" for comments, samples in families.values())

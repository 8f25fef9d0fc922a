"""Builds engines as JSON lines on its standard input say, in a process of its own: a crash of the library ends it only.

A line is ``[name, file, options]``; ``text`` in place of a file's name are its bytes. Answers are JSON lines, too.
"""

import json
import sys
from pathlib import Path

from companion import CompanionError
from companion.engines import tensorrt


def build(file, options):
    """What was built, or what was said."""
    seen = []
    stop = options.pop("stop_after", None)

    def follow(fraction, phase):
        seen.append(fraction)
        return stop is None or len(seen) < stop

    source = file.removeprefix("text:").encode() if file.startswith("text:") else Path(file)
    try:
        made = tensorrt.build(source, on_progress=follow, **options)
    except CompanionError as error:
        return {"error": str(error), "steps": len(seen)}
    return {
        "plan": len(made.plan),
        "profiles": made.profiles,
        "layers": made.layers,
        "precision": made.precision,
        "key": made.key,
        "device": made.device,
        "library": made.library,
        "description": made.description,
        "progress": seen,
        "types": sorted(
            {layer.precision for layer in tensorrt.layers(source, precision=options.get("precision", "fp32"))}
        ),
    }


for line in sys.stdin:
    name, file, options = json.loads(line)
    print(json.dumps({"case": name, **build(file, options)}), flush=True)

"""Find objects in pictures: from an image to boxes in its own pixels, with any engine (2.3.1)."""

from companion.detect.detector import Detections, Detector, coco_labels, read_image
from companion.detect.drawing import draw
from companion.detect.placement import Placement, letterbox
from companion.detect.video import Frame, Frames, Report, Stage, frames, is_camera, is_video, watch, write_video
from companion.models.boxes import candidates, overlaps, suppress

__all__ = [
    "Detections",
    "Detector",
    "Frame",
    "Frames",
    "Placement",
    "Report",
    "Stage",
    "candidates",
    "coco_labels",
    "draw",
    "frames",
    "is_camera",
    "is_video",
    "letterbox",
    "overlaps",
    "read_image",
    "suppress",
    "watch",
    "write_video",
]

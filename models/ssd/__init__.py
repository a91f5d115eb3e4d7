"""Single-shot object detection: TinySSD, its anchors, matching, loss, detections and metric."""

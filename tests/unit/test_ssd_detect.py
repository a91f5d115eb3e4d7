import torch

from models.ssd.detect import detect

ANCHORS = torch.tensor(
    [[0.1, 0.08, 0.52, 0.92], [0.08, 0.2, 0.56, 0.95], [0.15, 0.3, 0.62, 0.91], [0.55, 0.2, 0.9, 0.88]]
)
# Probabilities of background, dog, cat; each row an anchor.
LOGITS = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.8, 0.2], [0.0, 0.7, 0.3], [0.0, 0.1, 0.9]]).clamp(min=1e-12).log()[None]


def test_the_books_example():
    (found,) = detect(ANCHORS, LOGITS, torch.zeros(1, 4, 4))
    best = found.labels_D.argsort()  # both scores are 0.9, but for rounding
    assert found.labels_D[best].tolist() == [0, 1]
    torch.testing.assert_close(found.boxes_D4[best], ANCHORS[[0, 3]])
    torch.testing.assert_close(found.scores_D, torch.tensor([0.9, 0.9]))


def test_boxes_of_different_classes_do_not_suppress_each_other():
    logits = LOGITS[:, [0, 1]].clone()
    logits[0, 1] = logits[0, 1, [0, 2, 1]]
    (found,) = detect(ANCHORS[:2], logits, torch.zeros(1, 2, 4))
    assert found.labels_D.tolist() == [0, 1]


def test_threshold_and_limit_and_order():
    torch.manual_seed(0)
    low = torch.rand(300, 2) * 0.9
    boxes = torch.cat((low, low + 0.02), dim=1)
    logits = torch.randn(2, 300, 3) * 3
    for found in detect(boxes, logits, torch.zeros(2, 300, 4), score_threshold=0.3, max_detections=20):
        assert len(found.scores_D) == len(found.labels_D) == len(found.boxes_D4) == 20
        assert (found.scores_D > 0.3).all()
        assert torch.equal(found.scores_D, found.scores_D.sort(descending=True).values)


def test_nothing_found():
    logits = torch.tensor([10.0, 0.0, 0.0]).expand(2, 4, 3)
    for found in detect(ANCHORS, logits, torch.zeros(2, 4, 4)):
        assert found.boxes_D4.shape == (0, 4)
        assert found.labels_D.dtype == torch.int64


def test_predictions_that_are_not_numbers_find_nothing():
    (found,) = detect(ANCHORS, torch.full((1, 4, 3), torch.nan), torch.full((1, 4, 4), torch.nan))
    assert len(found.scores_D) == 0

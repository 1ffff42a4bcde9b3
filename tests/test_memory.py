"""The meter of tensor memory."""

import torch

from lora_one.memory import LivePeak


def test_the_meter_sees_the_peak_and_forgets_the_dead():
    with LivePeak() as meter:
        kept = torch.zeros(1000)
        torch.zeros(500)
        more = kept + 1
        view = more[:10]
        assert meter.live == 8000
        del more
        assert meter.live == 8000
        del view
    assert (meter.live, meter.peak) == (4000, 8000)


def test_what_was_there_before_does_not_count():
    weight = torch.ones(100, 100)
    with LivePeak() as meter:
        view = weight.T[:10]
        weight.add_(1)
        total = view.sum()
    assert meter.peak == total.numel() * 4

"""The suites of both record types."""

from __future__ import annotations

from plugmesh.testing.conformance import KvCodecConformance, WeightFormatConformance


class TestFormat(WeightFormatConformance):
    """Four bits on weights of pure noise: 9 % of error in every matrix, a standard deviation of 0.3 in the logits, and the bound is on the largest of 211.
    That the error is the codes' and nothing else's is checked in test_weights.py."""

    slug = "qserve"
    settings = {"calibration_tokens": 256}
    max_logit_error = 1.3


class TestFormatAsInThePaper(WeightFormatConformance):
    """No rotation, no search, no compensation, per group as the rule says."""

    slug = "qserve"
    settings = {"group": 64, "calibration_tokens": 0, "rotate": False, "search": False}
    max_logit_error = 1.6


class TestCodec(KvCodecConformance):
    """The suite's keys and values are noise, which four bits hold worst: the error of a score is that of 64 channels, and what is averaged is near zero."""

    slug = "qserve"
    max_error = 0.6

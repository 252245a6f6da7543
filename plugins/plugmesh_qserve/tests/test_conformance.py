"""The suites of both record types."""

from __future__ import annotations

from plugmesh.testing.conformance import KvCodecConformance, WeightFormatConformance


class TestFormat(WeightFormatConformance):
    slug = "qserve"
    settings = {"calibration_tokens": 256}  # noqa: RUF012 - the suite's own attribute
    max_logit_error = 1.0


class TestFormatAsInThePaper(WeightFormatConformance):
    """No rotation, no search, no compensation, per group as the rule says."""

    slug = "qserve"
    settings = {"calibration_tokens": 0, "rotate": False, "search": False}  # noqa: RUF012
    max_logit_error = 1.0


class TestCodec(KvCodecConformance):
    """The suite's keys and values are noise, which four bits hold worst: the error of a score is that of 64 channels, and what is averaged is near zero."""

    slug = "qserve"
    max_error = 0.4

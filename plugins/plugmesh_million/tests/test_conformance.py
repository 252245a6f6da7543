"""What every KV codec must do."""

from __future__ import annotations

from typing import Any

import pytest

from plugmesh.testing.conformance.kv_codec import VERSION, KvCodecConformance
from plugmesh_million import train
from plugmesh_million.plugin import Settings
from plugmesh_million.tests import made


class TestMillion(KvCodecConformance):
    slug = "million"
    max_error = 0.35  # queries and keys twice as large as usual (layer 1 of the suite): 4 bits show
    max_chunk_error = 0.25  # a half block that was exported lost its exact rows; where nothing is exported, test_codec.py asks for equal bits

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _trained(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Codebooks for the suite's rows, kept where the plugin looks for those of this model."""
        folder = tmp_path_factory.mktemp("books")
        cls.settings = {"codebooks": str(folder), "model": "none"}
        found = Settings()
        recipe = train.Recipe(found.scope, found.tokens, found.iterations, found.seed)
        train.save(train.file_of(folder, VERSION, recipe), made.books(cls.config))

    def test_chunks_and_company_do_not_change_a_row(self, codec: Any) -> None:
        self.max_chunk_error = 0.0  # type: ignore[misc] # of this test alone
        super().test_chunks_and_company_do_not_change_a_row(codec)

    def test_what_was_stored_last_counts(self, codec: Any) -> None:
        self.max_chunk_error = 0.0  # type: ignore[misc] # of this test alone
        super().test_what_was_stored_last_counts(codec)

"""The tokenizer service: text or chat messages to token ids and back, without torch.

Reading order: `models.py` (which tokenizers are loaded), `fetch.py` (their files, from the weightstore), `load.py` and
`pretokenize.py` (files to a `Vocabulary`), `encode.py` (text to ids), `template.py` with `provenance.py`, `render.py`
and `render_worker.py` (chat messages to ids), `detokenize.py` (ids to text, as a stream), `service.py` (the wire).
"""

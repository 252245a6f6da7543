"""The gateway: OpenAI HTTP and gRPC in front, decode and tokenizer instances behind.

A request passes the files in this order: `http` or `grpc_service` (edge), `parse` (body to record), `keys`, `handle`
(the path in one page), `admit`, `prepare`, `route`, `decode_links` and `text_links` (streams shared by all requests),
`generation` (the state of one request), `respond` (OpenAI shapes).
"""

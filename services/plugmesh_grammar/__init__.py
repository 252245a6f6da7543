"""The grammar service: compiles grammars in processes that can be killed, keeps the compiled forms, and serves masks to other engines."""

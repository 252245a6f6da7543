"""Generated protocol buffers of plugmesh."""

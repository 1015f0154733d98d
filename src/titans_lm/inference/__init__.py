"""Reading and answering with a memory: texts of any length, prompts, a server."""

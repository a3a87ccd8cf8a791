"""Chapter 1: a chat pipeline of three processes, frontend, processor and engine."""

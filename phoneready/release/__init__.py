"""The stages of a release: the engine that runs them, their work, and what they left."""

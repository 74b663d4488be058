"""The release pipeline: configuration, resumable stages, report and manifest."""

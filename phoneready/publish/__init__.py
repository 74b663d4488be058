"""What a finished release leaves for its user: files, hashes, manifest, card and bill of materials."""

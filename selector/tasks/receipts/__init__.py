"""Windows of real scanned receipts: `windows`, their scans and split `scans`, the boxes of characters `glyphs`."""

"""Wire types and leaf helpers shared by every chapter; no chapter's lesson lives here."""

"""Records into tables and figures; no model is ever loaded here."""

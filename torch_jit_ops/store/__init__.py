"""Built variants on disk: content-addressed, private, checked before they are used."""

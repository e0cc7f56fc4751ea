"""The arms that come with weightlab, one file a family."""

"""The device allow list: data, validation and its evaluation against drivers."""

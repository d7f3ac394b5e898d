"""Every method in every cell of batch size, kind of text and temperature, beside plain decoding."""

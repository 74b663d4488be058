"""Devices: profiles of phones and boards, and what is projected for them."""

"""Certificates: does speculative decoding say what the target alone would say?"""

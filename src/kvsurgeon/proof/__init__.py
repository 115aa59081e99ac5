"""The obligations that axes alone do not prove: causality and prefix stability, decided by running context."""

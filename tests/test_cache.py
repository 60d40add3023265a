"""Where the cache is, by what the environment says."""

import pytest

from hf_multimax.cache import cache_folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_MULTIMAX_CACHE": "/somewhere"}, "/somewhere"),
        ({"HF_MULTIMAX_CACHE": "/somewhere", "XDG_CACHE_HOME": "/xdg"}, "/somewhere"),
        ({"HF_MULTIMAX_CACHE": "~"}, "/home/someone"),
        ({"HF_MULTIMAX_CACHE": "~/x"}, "/home/someone/x"),
        ({"HF_MULTIMAX_CACHE": "x/~"}, "/here/x/~"),
        ({"HF_MULTIMAX_CACHE": "../x"}, "/here/../x"),
        ({"HF_MULTIMAX_CACHE": ""}, "/home/someone/.cache/hf_multimax"),
        ({"HF_MULTIMAX_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/hf_multimax"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "/home/someone/xdg/hf_multimax"),
        ({"XDG_CACHE_HOME": "xdg"}, "/home/someone/.cache/hf_multimax"),
        ({"XDG_CACHE_HOME": ""}, "/home/someone/.cache/hf_multimax"),
        ({}, "/home/someone/.cache/hf_multimax"),
    ],
    ids=str,
)
def test_the_cache_follows_the_environment(environment, expected, monkeypatch, tmp_path):
    for name in ("HF_MULTIMAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert str(cache_folder()).replace(str(tmp_path), "/here") == expected


@pytest.mark.parametrize("chosen", ["", "~nobody-of-this-name/x"])
def test_a_home_folder_that_is_not_known_is_an_error_with_the_way_out(chosen, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where no home folder is known
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HF_MULTIMAX_CACHE", chosen)
    with pytest.raises(OSError, match="home directory. Set HF_MULTIMAX_CACHE"):
        cache_folder()

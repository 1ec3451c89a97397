"""The host's apt configuration, as Debian, Ubuntu and others write it."""

from __future__ import annotations

from pathlib import Path

from vmkernel.image.apt import (
    Mirrors,
    choose_mirrors,
    host_mirrors,
    network_options,
    parse_deb822,
    parse_one_line,
    source_lines,
    without_credentials,
)

DEBIAN_DEB822 = """\
Types: deb deb-src
# a comment in between
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: bookworm
Components: main
"""

DEBIAN_ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb cdrom:[Debian GNU/Linux 12]/ bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/apt bookworm main
deb https://also-vendor.example/apt bookworm stable
deb http://only-release.example/debian bookworm main
deb [ arch=amd64 ] http://mirror.example/debian/ bookworm main non-free # the near one
deb-src http://mirror.example/debian/ bookworm main
deb http://mirror.example/debian/ bookworm-updates main
deb http://security.example/debian-security bookworm-security/updates main
"""

UBUNTU = """\
Types: deb
URIs: http://archive.ubuntu.example/ubuntu/
Suites: noble noble-updates noble-backports
Components: main universe restricted multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg
"""


def host(directory: Path, release: str, **files: str) -> Path:
    (directory / "apt/sources.list.d").mkdir(parents=True)
    (directory / "os-release").write_text(release)
    for name, text in files.items():
        (directory / "apt" / name.replace("__", "/").replace("_", ".")).write_text(text)
    return directory


BOOKWORM = 'ID=debian\nVERSION_CODENAME="bookworm"\n'


def test_deb822_of_a_debian_host(tmp_path: Path) -> None:
    etc = host(tmp_path, BOOKWORM)
    (etc / "apt/sources.list.d/debian.sources").write_text(DEBIAN_DEB822)
    assert host_mirrors(etc) == Mirrors(
        main="http://mirror.example/debian", security="http://security.example/debian-security"
    )


def test_one_line_of_a_debian_host_with_other_publishers(tmp_path: Path) -> None:
    etc = host(tmp_path, BOOKWORM)
    (etc / "apt/sources.list").write_text(DEBIAN_ONE_LINE)
    # only-release.example comes first, but only the other also serves updates, as Debian does
    assert host_mirrors(etc) == Mirrors(
        main="http://mirror.example/debian/", security="http://security.example/debian-security"
    )


def test_suites_by_their_role() -> None:
    sources = parse_one_line("deb http://m.example/debian stable main\n")
    assert choose_mirrors(sources, "trixie") == Mirrors(main="http://m.example/debian")


def test_an_ubuntu_host_names_no_debian_mirror(tmp_path: Path) -> None:
    etc = host(tmp_path, "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n")
    (etc / "apt/sources.list.d/ubuntu.sources").write_text(UBUNTU)
    assert host_mirrors(etc) is None
    assert choose_mirrors(parse_deb822(UBUNTU), "noble") is None


def test_a_host_without_apt(tmp_path: Path) -> None:
    assert host_mirrors(tmp_path) is None
    (tmp_path / "os-release").write_text(BOOKWORM + "broken='\n")
    assert host_mirrors(tmp_path) is None


def test_a_deb822_file_of_a_vendor_only(tmp_path: Path) -> None:
    etc = host(tmp_path, BOOKWORM)
    (etc / "apt/sources.list.d/vendor.sources").write_text(
        "Types: deb\nURIs: https://vendor.example\nSuites: bookworm\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/vendor.gpg\n"
    )
    assert host_mirrors(etc) is None


def test_guest_sources_are_of_the_guests_release() -> None:
    lines = source_lines(
        Mirrors(main="http://m.example/d", security="http://s.example/s"), "trixie"
    )
    assert [line.split()[-3:] for line in lines] == [
        ["http://m.example/d", "trixie", "main"],
        ["http://m.example/d", "trixie-updates", "main"],
        ["http://s.example/s", "trixie-security", "main"],
    ]
    assert len(source_lines(Mirrors(main="http://m.example/d"), "trixie")) == 2


def test_only_options_of_reaching_a_mirror_are_taken() -> None:
    dump = """
    APT::Install-Recommends "true";
    Acquire "";
    Acquire::http "";
    Acquire::http::Proxy "http://proxy.example:3128/";
    Acquire::https::mirror.example::Proxy "DIRECT";
    Acquire::https::CaInfo "/etc/ssl/company.pem";
    Acquire::Retries "5";
    Acquire::Check-Valid-Until "false";
    Acquire::AllowInsecureRepositories "1";
    Acquire::Languages:: "none";
    Dir::Etc "etc/apt";
    DPkg::Post-Invoke:: "rm -f /x || true";
    """
    assert network_options(dump.splitlines()) == [
        'Acquire::http::Proxy "http://proxy.example:3128/"',
        'Acquire::https::mirror.example::Proxy "DIRECT"',
        'Acquire::https::CaInfo "/etc/ssl/company.pem"',
        'Acquire::Retries "5"',
        'Acquire::Check-Valid-Until "false"',
    ]


def test_credentials_do_not_reach_the_guest() -> None:
    assert without_credentials("https://me:secret@m.example:8/d") == "https://m.example:8/d"
    assert without_credentials("http://m.example/d") == "http://m.example/d"

# shellcheck shell=bash
#
# lib.sh: what tools/demo and tools/test share.  Sourced, not run.
#
# It promises that whatever a script started or made through it is gone when
# the script ends, be it by success, error, Ctrl-C or SIGTERM: commands begun
# with "supervise" or "aside", every server with its data below the work directory, and
# the work directory itself.  The checkout is read and never written.
#
# Words: the "work directory" is a temporary directory of one run; the "server
# user" is who runs PostgreSQL, which refuses to be run by root: postgres for
# root, otherwise the caller.
#
# Easy to get wrong here: bash acts on a signal only after the command in the
# foreground has ended.  So anything that may take long runs in the background
# with a process group of its own, and is waited for.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
work=
bindir=
job=
declare -A asides=()
trash=()

# LANG as well, because PostgreSQL's Perl modules take LC_ALL away.
export LANG=C.UTF-8 LC_ALL=C.UTF-8
# Neither the caller's connection settings nor those of a calling make count.
unset "${!PG@}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS

say() {
	printf '== %s\n' "$*"
}

die() {
	printf '%s: %s\n' "$(basename "$0")" "$*" >&2
	exit 1
}

# ---------------------------------------------------------------------------
# Leaving nothing behind
# ---------------------------------------------------------------------------

# Makes the work directory, readable for the server user, and sees to it that
# it goes away.  To be called once, before anything is started.
open_work_directory() {
	trap close_work_directory EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	work=$(mktemp -d "${TMPDIR:-/tmp}/risky_migrations.XXXXXX")
	trash+=("$work")
	chmod 755 "$work"
}

close_work_directory() {
	local status=$? pid

	# A second Ctrl-C must not cut the clean-up short.
	trap '' HUP INT TERM PIPE
	set +e
	for pid in $job "${asides[@]}"; do
		kill -TERM -- "-$pid" 2>/dev/null
		wait "$pid" 2>/dev/null
	done
	stop_servers
	rm -rf --one-file-system -- "${trash[@]}"
	exit "$status"
}

# Runs a command in its own process group and waits, so that signals to this
# script are answered at once.  Not for commands that may ask for a password.
# File descriptor 9 is the lock of lock_installation, which nothing that
# outlives this script may keep.
supervise() {
	local status=0

	set -m
	"$@" </dev/null 9>&- &
	job=$!
	set +m
	wait "$job" || status=$?
	job=
	return "$status"
}

# Begins a command likewise, under a name, but does not wait: that is for wait_for.
aside() {
	local name=$1

	shift
	set -m
	"$@" </dev/null 9>&- &
	asides[$name]=$!
	set +m
}

# Waits for what was begun under that name, if anything was; its status.
wait_for() {
	local status=0

	[[ -n ${asides[$1]:-} ]] || return 0
	wait "${asides[$1]}" || status=$?
	unset "asides[$1]"
	return "$status"
}

# Runs a command with its output on the screen and in a file.
logged() {
	local file=$1

	shift
	"$@" 2>&1 | tee "$file"
}

# ---------------------------------------------------------------------------
# Privileges and packages
# ---------------------------------------------------------------------------

can_be_root() {
	((EUID == 0)) || command -v sudo >/dev/null
}

as_root() {
	if ((EUID == 0)); then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -- "$@"
	else
		die "needs root, be root or install sudo, to run: $*"
	fi
}

# Runs a command as the server user, with the tools of the chosen PostgreSQL
# first in PATH and the home in the work directory.  By setpriv, because unlike
# runuser it leaves no process of its own that would outlive a signal.
as_server_user() {
	local environment=(env HOME="$work" PATH="$bindir:$PATH" PGUSER=postgres)

	if ((EUID == 0)); then
		setpriv --reuid postgres --regid postgres --init-groups -- "${environment[@]}" "$@"
	else
		"${environment[@]}" "$@"
	fi
}

give_to_server_user() {
	((EUID != 0)) || chown -R postgres: "$@"
}

# Installs those of the given Debian packages that are missing; does not touch
# apt when there are none.  Needs the work directory.
ensure_packages() {
	local package missing=()

	for package in "$@"; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
			missing+=("$package")
	done
	((${#missing[@]})) || return 0
	can_be_root || die "missing packages: ${missing[*]}; install them, or run this as root or with sudo"

	say "installing ${missing[*]}"
	# A list that cannot be refreshed (a third party's, say) need not matter.
	as_root apt-get -qq update || say "apt-get update failed, trying with the lists there are"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
		-o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
		install --no-install-recommends "${missing[@]}" >"$work/apt.log" 2>&1 || {
		cat "$work/apt.log" >&2
		die "apt-get cannot install ${missing[*]}"
	}
}

# ---------------------------------------------------------------------------
# PostgreSQL installations
# ---------------------------------------------------------------------------

# The packages it takes to build the extension for a major version and run it.
# PostgreSQL's headers want those of ICU without depending on their package.
packages_to_build() {
	printf '%s\n' "postgresql-$1" "postgresql-server-dev-$1" gcc libc6-dev libicu-dev make
}

debian_pg_config() {
	printf '/usr/lib/postgresql/%s/bin/pg_config\n' "$1"
}

major_version() {
	"$1" --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/'
}

# The major version that is "this machine's": of RM_PG_CONFIG if set, else the
# one its Debian release carries.
native_version() {
	if [[ -n ${RM_PG_CONFIG:-} ]]; then
		major_version "$RM_PG_CONFIG"
		return
	fi
	case $(. /etc/os-release && printf '%s-%s' "${ID:-}" "${VERSION_ID:-}") in
		debian-12) echo 15 ;;
		debian-13) echo 17 ;;
		*) die "not Debian 12 or 13: set RM_PG_CONFIG to the pg_config of a PostgreSQL 15-18" ;;
	esac
}

# Sets pg_config, bindir and pgxs to the installation of a major version; all
# its packages have to be there.
use_postgresql() {
	pg_config=${RM_PG_CONFIG:-$(debian_pg_config "$1")}
	[[ -x $pg_config ]] || die "no $pg_config"
	bindir=$("$pg_config" --bindir)
	pgxs=$("$pg_config" --pgxs)
	pgxs=${pgxs%/src/makefiles/pgxs.mk}
	[[ -e $pgxs/src/makefiles/pgxs.mk ]] || die "no PGXS in $pgxs: the server's development files are missing"
}

# Only one run at a time may install into a PostgreSQL and use what it has
# installed.  Held until the script ends.
lock_installation() {
	exec 9<"$("$pg_config" --pkglibdir)"
	flock --nonblock 9 || {
		say "waiting for another run that uses $bindir"
		flock 9
	}
}

# Copies the files of the checkout (tracked, or new and not ignored) into a
# directory; without git, all files.  The checkout may be another user's.
copy_sources() {
	local git=(git -c safe.directory='*' -C "$top")

	mkdir "$1"
	if [[ -e $top/.git ]]; then
		"${git[@]}" ls-files -z --cached --others --exclude-standard |
			while IFS= read -r -d '' file; do
				# A tracked file may have been removed in the checkout.
				[[ ! -e $top/$file && ! -L $top/$file ]] || printf '%s\0' "$file"
			done |
			tar -C "$top" --null --verbatim-files-from -T - -cf - |
			tar -C "$1" --no-same-owner -xf -
	else
		cp -R --no-dereference "$top/." "$1"
	fi
}

# Whether the caller can install an extension without becoming root.
may_install() {
	[[ -w $("$pg_config" --pkglibdir) && -w $("$pg_config" --sharedir)/extension ]]
}

# Builds the copied sources as the server user and installs them.  Further
# arguments go to make.
build_and_install() {
	local source=$1 make install=as_root

	shift
	! may_install || install=
	make=(make --no-print-directory -s -C "$source" PG_CONFIG="$pg_config" with_llvm=no "$@")
	give_to_server_user "$source"
	supervise as_server_user "${make[@]}" -j "$(nproc)" all
	$install "${make[@]}" install
}

# ---------------------------------------------------------------------------
# Throwaway servers
# ---------------------------------------------------------------------------

# Makes and starts a server with the settings read from standard input.  It
# listens only on a socket in the work directory, so its port is always free;
# PGHOST is set for the commands to come.  The log is $work/server.log.
start_server() {
	mkdir "$work/data" "$work/socket"
	touch "$work/server.log"
	give_to_server_user "$work/data" "$work/socket" "$work/server.log"
	as_server_user initdb -D "$work/data" -U postgres --auth=trust \
		--no-locale --encoding=UTF8 --no-sync >"$work/initdb.log" 2>&1 9>&- || {
		cat "$work/initdb.log" >&2
		die "initdb failed"
	}
	{
		cat
		printf "listen_addresses = ''\nport = 5432\nunix_socket_directories = '%s'\n" "$work/socket"
	} >>"$work/data/postgresql.conf"
	as_server_user pg_ctl -D "$work/data" -l "$work/server.log" -s -w start </dev/null 9>&- || {
		cat "$work/server.log" >&2
		die "the server does not start"
	}
	export PGHOST=$work/socket
}

# Stops every server with its data below the work directory.
stop_servers() {
	local dir

	[[ -n $bindir && -d $work ]] || return 0
	find "$work" -name postmaster.pid -printf '%h\0' |
		while IFS= read -r -d '' dir; do
			as_server_user pg_ctl -D "$dir" -s -m immediate -w stop </dev/null >/dev/null 2>&1
		done
}

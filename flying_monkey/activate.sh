#!/bin/sh
# Runs on the machine, as root. It activates a configuration outside of the ssh session that asked for it. A watchdog
# reverts the machine unless toto confirms, over a new connection, that it can still connect.
# (The idea is deploy-rs's "magic rollback"; this one reverts to the store path that toto recorded.)
#
#   facts                                               print what the machine runs and boots
#   begin NAME ACTION PATH SYSTEM PROFILE FINISH CONFIRM [SECONDS]  start an activation and its watchdog; print busy,
#                                                       and start none, while another tool activates. With SECONDS, go
#                                                       on as `result`: who asks may not be let in a second time
#   result NAME SECONDS                                 wait for an activation to end; print how it ended, and its log
#   confirm NAME                                        stop the watchdog: toto can connect
#   back NAME                                           have the watchdog revert at once: toto cannot connect anew
#   names RUN                                           print the names of the run's activations that left files here
#   broken                                              print the units that failed, or are started again and again
#   quiet SECONDS                                       wait until no tool activates anything; print quiet or busy
#   clean-up RUN                                        remove the files of a run, once no activation is under way
#   login SYSTEM                                        serve one login on standard input and output, as SYSTEM's sshd
#                                                       would, with its keys and its sudoers
#   listening SYSTEM                                    print where SYSTEM's sshd would listen
#   addresses SYSTEM                                    print the addresses that SYSTEM configures
#
# NAME is RUN.VERB.NUMBER, new for every activation. ACTION is test, switch or boot. SYSTEM and PROFILE are what the
# watchdog reverts to. FINISH and CONFIRM are in seconds; CONFIRM 0 starts no watchdog. All state is in /run, so it is
# gone after a reboot, which boots the boot default.
set -u
umask 077
PATH=/run/wrappers/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:${PATH:-/usr/bin:/bin}:/usr/bin:/bin
export PATH
state=/run/toto
profile=/nix/var/nix/profiles/system
# The lock that NixOS's switch-to-configuration holds while it runs, and the unit in which nixos-rebuild runs it.
switching=/run/nixos/switch-to-configuration.lock
rebuilding=nixos-rebuild-switch-to-configuration.service
roots=/nix/var/nix/gcroots
# nix uses the store directly: this is root, and the activation may be restarting the daemon.
export NIX_REMOTE=

die() { echo "toto: $*" >&2; exit 64; }

use_run() {
	case $1 in '' | .* | *[!A-Za-z0-9._-]*) die "not a run: $1" ;; esac
	dir=$state/$1
}

# Seconds since the boot: the clock may be wrong, and a busy machine sleeps longer than it is asked to.
now() {
	read -r uptime _ </proc/uptime
	echo "${uptime%%.*}"
}

# Wait up to so many seconds until a command succeeds.
within() {
	end=$(($(now) + $1))
	shift
	until "$@"; do
		[ "$(now)" -lt "$end" ] || return 1
		sleep 0.2
	done
}

# Run a command in the background; its exit status comes to a file, unless there is one by then.
to_file() {
	file=$1
	shift
	(
		"$@" >>"$dir/log" 2>&1
		echo $? >"$file.$$.new" && ln "$file.$$.new" "$file" 2>/dev/null
	) 9>&- &
}

facts() {
	echo "system=$(readlink -f /run/current-system)"
	if [ -L "$profile" ]; then echo "profile=$(readlink -f "$profile")"; else echo "profile="; fi
}

begin() {
	use_run "$1"
	[ "$(quiet 0)" = quiet ] || { echo "busy"; return; }
	mkdir "$dir" && echo "$3" >"$dir/path" || die "cannot make $dir"
	# The guard runs a copy of this file: a shell reads its script while it runs, and a new run replaces this file.
	cp "$0" "$dir/guard.sh.new" && mv "$dir/guard.sh.new" "$dir/guard.sh" || die "cannot write to $dir"
	if [ -d /run/systemd/system ]; then
		systemd-run --collect --no-ask-password --quiet --unit="toto-$1-$$" --setenv=PATH="$PATH" \
			/bin/sh "$dir/guard.sh" guard "$@" || die "systemd-run refused"
	else
		setsid /bin/sh "$dir/guard.sh" guard "$@" </dev/null >/dev/null 2>&1 &
	fi
	# Wait until it runs: before that, the end of this connection could still end it.
	within 20 [ -e "$dir/begun" ] || die "the activation did not begin"
	[ $# -lt 8 ] || result "$1" "$8"
}

# The process that outlives the connection: it runs the activation, and is its watchdog.
guard() {
	use_run "$1"
	echo $$ >"$dir/begun"
	action=$2 path=$3 system=$4 profile_before=$5 finish=$6 confirm=$7
	# The system from before stays usable, and in the store, until this is decided.
	PATH=$system/sw/bin:$PATH
	if command -v flock >/dev/null; then
		exec 9>"$state/lock"
		flock 9 || exit 1 # wait for the decision on a different activation; that one has a time limit
	fi
	mkdir -p "$roots"
	ln -sfn "$system" "$roots/toto-before"
	ln -sfn "$path" "$roots/toto-after"
	broken >"$dir/broken"
	# Nothing that can hang stands between the activation and the way back: a process that waits for a dead disk or a
	# dead server cannot even be killed, and then holds the lock.
	to_file "$dir/status" activate "$action" "$path"
	if ! within $((finish + 30)) [ -e "$dir/status" ]; then
		echo "toto: it hangs, and cannot be ended" >>"$dir/log"
		to_file "$dir/status" sh -c 'exit 124'
		rm -f "$switching"
	fi
	[ "$confirm" -gt 0 ] || exit 0
	within "$confirm" to_decide
	[ -d "$dir/decided" ] && exit 0
	mkdir "$dir/decided" 2>/dev/null || exit 0
	to_file "$dir/back" revert
	within $((finish * 2 + 60)) [ -e "$dir/back" ] || to_file "$dir/back" sh -c 'exit 124'
}

to_decide() { [ -d "$dir/decided" ] || [ -e "$dir/lost" ]; }

activate() {
	case $1 in
	switch | boot) timeout -k 10 "$finish" nix-env --profile "$profile" --set "$2" || return ;;
	esac
	(umask 022 && exec timeout -k 10 "$finish" "$2/bin/switch-to-configuration" "$1")
	code=$?
	if [ "$code" = 4 ] && [ -e "$dir/broken" ] && command -v systemctl >/dev/null; then
		broken >"$dir/broken.now"
		fresh=$(grep -vxF -f "$dir/broken" "$dir/broken.now" | tr '\n' ' ')
		if [ -n "$fresh" ]; then
			echo "toto: broken since this activation: $fresh"
		elif [ -s "$dir/broken.now" ]; then
			echo "toto: the units that failed were broken before"
			code=0
		fi
	fi
	(
		sync
		: >"$dir/synced"
	) &
	within 10 [ -e "$dir/synced" ] || echo "toto: not all is on the disk yet"
	return $code
}

broken() {
	timeout 10 systemctl list-units --all --plain --no-legend --no-pager --state=failed,auto-restart 2>/dev/null |
		while read -r unit _; do echo "$unit"; done
}

# What runs goes back first, and whatever fails, the rest is done.
revert() {
	echo "toto: not confirmed within $confirm s, reverting to $system"
	reverted=0
	[ "$action" = boot ] || activate test "$system" || reverted=$?
	if [ "$action" != test ] && [ -n "$profile_before" ] && [ "$(readlink -f "$profile")" != "$profile_before" ]; then
		activate boot "$profile_before" || reverted=$?
	fi
	return $reverted
}

result() {
	use_run "$1"
	[ -d "$dir" ] || { echo "unknown"; return; }
	within "$2" [ -e "$dir/status" ]
	if [ -e "$dir/back" ]; then
		echo "back $(cat "$dir/back")"
	elif [ -e "$dir/status" ]; then
		echo "done $(cat "$dir/status")"
	else
		echo "running"
	fi
	[ ! -e "$dir/log" ] || tail -n 50 "$dir/log"
}

confirm() {
	use_run "$1"
	[ -d "$dir" ] || { echo "unknown"; return; }
	if mkdir "$dir/decided" 2>/dev/null; then
		: >"$dir/confirmed"
		echo "confirmed"
	elif [ -e "$dir/confirmed" ]; then
		echo "confirmed"
	else
		echo "back"
	fi
}

back() {
	use_run "$1"
	[ -d "$dir" ] || { echo "unknown"; return; }
	: >"$dir/lost"
}

names() {
	use_run "$1"
	for each in "$dir".*; do
		[ -d "$each" ] && echo "${each##*/}"
	done
	return 0
}

# The lock is a file that everybody may open, and so hold, and with it every activation. A file in its place that only
# root may open is a different lock.
only_roots() {
	[ -e "$switching" ] || return 0
	inode=$(stat -c %i "$switching")
	while read -r _ _ _ _ pid file _; do
		if [ "${file##*:}" = "$inode" ] && [ "$(stat -c %u "/proc/$pid" 2>/dev/null)" != "$(id -u)" ]; then
			rm -f "$switching"
			break
		fi
	done </proc/locks
	(umask 077 && : >>"$switching")
	chmod 600 "$switching"
}

no_tool_activates() {
	! systemctl is-active --quiet "$rebuilding" 2>/dev/null &&
		{ [ ! -e "$switching" ] || ! command -v flock >/dev/null || flock -n "$switching" true; }
}

quiet() {
	only_roots
	within "$1" no_tool_activates || { echo "busy"; return; }
	echo "quiet"
}

clean_up() {
	use_run "$1"
	if command -v flock >/dev/null; then
		exec 9>"$state/lock"
		flock 9 # wait for an activation that is not decided yet; it has a time limit
	fi
	rm -rf "$dir".*
	rm -f "$roots/toto-before" "$roots/toto-after"
}

# Set `config` and `sshd` to those of `system`.
use_sshd() {
	config=$system/etc/ssh/sshd_config
	[ -e "$config" ] || die "it has no sshd"
	sshd=$(grep -ho '/nix/store/[^ "]*/bin/sshd' "$system"/etc/systemd/system/sshd*.service 2>/dev/null | head -n 1)
	[ -x "$sshd" ] || sshd=$system/sw/bin/sshd
	[ -x "$sshd" ] || die "it has no sshd"
}

# The host keys that there are: those of a new configuration may not be made yet.
host_keys() {
	for each in /etc/ssh/ssh_host_*_key; do
		[ -f "$each" ] && printf -- '-h %s ' "$each"
	done
}

# What the new configuration puts into /etc is mounted there, where only this login sees it.
login() {
	system=$1
	use_sshd
	exec unshare --mount --propagation private /bin/sh "$0" login-inside "$system"
}

login_inside() {
	system=$1
	use_sshd
	etc=$state/login
	umask 022
	{
		mkdir -p "$etc" && mount -t tmpfs -o mode=0755 toto "$etc" && mkdir "$etc/ssh" && cp -a /etc/ssh/. "$etc/ssh"
		rm -rf "$etc/ssh/authorized_keys.d"
		[ ! -d "$system/etc/ssh/authorized_keys.d" ] || cp -rL "$system/etc/ssh/authorized_keys.d" "$etc/ssh/"
		mount -o bind "$etc/ssh" /etc/ssh || die "it cannot be tried"
		if [ -e /etc/sudoers ]; then
			(umask 077 && cat "$system/etc/sudoers" >"$etc/sudoers")
			chmod 440 "$etc/sudoers"
			mount -o bind "$etc/sudoers" /etc/sudoers || die "it cannot be tried"
		fi
	} </dev/null >&2
	exec "$sshd" -i -e -f "$config" $(host_keys)
}

listening() {
	system=$1
	if [ -e "$system/etc/systemd/system/sshd.socket" ]; then
		sed -n 's/^ListenStream=//p' "$system/etc/systemd/system/sshd.socket"
		return
	fi
	use_sshd
	"$sshd" -T -f "$config" $(host_keys) -C user=root,host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22 |
		sed -n 's/^listenaddress //p'
}

addresses() {
	cat "$1"/etc/systemd/network/*.network 2>/dev/null | sed -n 's/^Address=//p'
	for unit in "$1"/etc/systemd/system/network-addresses-*.service; do
		[ -e "$unit" ] || continue
		for script in $(grep -o '/nix/store/[^ "]*' "$unit"); do
			[ -f "$script" ] && grep -oE '[0-9]+(\.[0-9]+){3}/[0-9]+|[0-9a-f:]*:[0-9a-f:]+/[0-9]+' "$script"
		done
	done | sort -u
}

verb=${1:-}
[ $# -gt 0 ] && shift
case $verb in
facts | begin | guard | result | confirm | back | names | quiet | broken | login | listening | addresses) "$verb" "$@" ;;
clean-up) clean_up "$@" ;;
login-inside) login_inside "$@" ;;
*) die "no such verb: $verb" ;;
esac

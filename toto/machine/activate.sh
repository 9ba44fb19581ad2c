#!/bin/sh
# Runs on the machine, as root: activates a configuration apart from the ssh session that asked for it, and
# goes back by itself unless toto confirms, over a new connection, that it still reaches the machine.
# (The idea is deploy-rs's "magic rollback"; what is gone back to is the store path that toto recorded.)
#
#   facts                                               what the machine runs
#   begin NAME ACTION PATH SYSTEM PROFILE FINISH CONFIRM  start an activation, and its watchdog
#   result NAME SECONDS                                 wait for its end, and tell it
#   confirm NAME                                        toto is there: no going back by itself any more
#   names RUN                                           the activations of a run that left something here
#   quiet SECONDS                                       wait until nobody activates, by whatever tool: quiet, or busy
#   forget RUN                                          remove what a run left here, once none is under way
#
# NAME is RUN.VERB.NUMBER, new for every activation. ACTION is test, switch or boot. SYSTEM and PROFILE are what to go back to. FINISH and CONFIRM are seconds;
# CONFIRM 0 arms no watchdog. All state is in /run: a reboot boots the boot default and forgets the rest.
set -u
umask 077
PATH=/run/wrappers/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:${PATH:-/usr/bin:/bin}:/usr/bin:/bin
export PATH
state=/run/toto
profile=/nix/var/nix/profiles/system
# What every switch-to-configuration of NixOS holds while it is under way, and the unit that nixos-rebuild gives it.
switching=/run/nixos/switch-to-configuration.lock
rebuilding=nixos-rebuild-switch-to-configuration.service
roots=/nix/var/nix/gcroots
# Let nix speak to the store itself: we are root, and the daemon may be among what is being restarted.
export NIX_REMOTE=

die() { echo "toto: $*" >&2; exit 64; }

use_run() {
	case $1 in '' | .* | *[!A-Za-z0-9._-]*) die "not a run: $1" ;; esac
	dir=$state/$1
}

facts() {
	echo "system=$(readlink -f /run/current-system)"
	if [ -L "$profile" ]; then echo "profile=$(readlink -f "$profile")"; else echo "profile="; fi
}

begin() {
	use_run "$1"
	mkdir "$dir" || die "cannot make $dir"
	# A copy of its own: a shell reads its script as it goes.
	cp "$0" "$dir/guard.sh.new" && mv "$dir/guard.sh.new" "$dir/guard.sh" || die "cannot write to $dir"
	if [ -d /run/systemd/system ]; then
		systemd-run --collect --no-ask-password --quiet --unit="toto-$1-$$" --setenv=PATH="$PATH" \
			/bin/sh "$dir/guard.sh" guard "$@" || die "systemd-run refused"
	else
		setsid /bin/sh "$dir/guard.sh" guard "$@" </dev/null >/dev/null 2>&1 &
	fi
	# Until it runs on its own, the end of this connection could still take it along.
	waited=0
	while [ ! -e "$dir/begun" ]; do
		[ "$waited" -lt 100 ] || die "the activation did not begin"
		sleep 0.1
		waited=$((waited + 1))
	done
}

# The process that outlives the connection.
guard() {
	use_run "$1"
	: >"$dir/begun"
	action=$2 path=$3 system=$4 profile_before=$5 finish=$6 confirm=$7
	# What went before stays usable, and in the store, until this is decided.
	PATH=$system/sw/bin:$PATH
	if command -v flock >/dev/null; then
		exec 9>"$state/lock"
		flock 9 || exit 1 # another activation is being decided: it ends within its own time
	fi
	mkdir -p "$roots"
	ln -sfn "$system" "$roots/toto-before"
	ln -sfn "$path" "$roots/toto-after"
	activate "$action" "$path" >"$dir/log" 2>&1 9>&-
	echo $? >"$dir/status.new" && mv "$dir/status.new" "$dir/status"
	[ "$confirm" -gt 0 ] || exit 0
	waited=0
	while [ "$waited" -lt $((confirm * 5)) ]; do
		[ -d "$dir/decided" ] && exit 0
		sleep 0.2
		waited=$((waited + 1))
	done
	mkdir "$dir/decided" 2>/dev/null || exit 0
	go_back >>"$dir/log" 2>&1 9>&-
	echo $? >"$dir/back.new" && mv "$dir/back.new" "$dir/back"
}

activate() {
	case $1 in
	switch | boot) nix-env --profile "$profile" --set "$2" || return ;;
	esac
	(umask 022 && exec timeout -k 10 "$finish" "$2/bin/switch-to-configuration" "$1")
	code=$?
	sync
	return $code
}

go_back() {
	echo "toto: not confirmed within $confirm s, going back to $system"
	went=0
	if [ "$action" != test ] && [ -n "$profile_before" ] && [ "$(readlink -f "$profile")" != "$profile_before" ]; then
		activate boot "$profile_before" || went=$?
	fi
	[ "$action" = boot ] || activate test "$system" || went=$?
	return $went
}

result() {
	use_run "$1"
	[ -d "$dir" ] || { echo "unknown"; return; }
	waited=0
	while [ ! -e "$dir/status" ] && [ "$waited" -lt $(($2 * 5)) ]; do
		sleep 0.2
		waited=$((waited + 1))
	done
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

names() {
	use_run "$1"
	for each in "$dir".*; do
		[ -d "$each" ] && echo "${each##*/}"
	done
	return 0
}

quiet() {
	waited=0
	while systemctl is-active --quiet "$rebuilding" 2>/dev/null ||
		{ [ -e "$switching" ] && command -v flock >/dev/null && ! flock -n "$switching" true; }; do
		[ "$waited" -lt $(($1 * 5)) ] || { echo "busy"; return; }
		sleep 0.2
		waited=$((waited + 1))
	done
	echo "quiet"
}

forget() {
	use_run "$1"
	if command -v flock >/dev/null; then
		exec 9>"$state/lock"
		flock 9 # whoever is still deciding ends within its own time
	fi
	rm -rf "$dir".*
	rm -f "$roots/toto-before" "$roots/toto-after"
}

verb=${1:-}
[ $# -gt 0 ] && shift
case $verb in
facts | begin | guard | result | confirm | names | quiet | forget) "$verb" "$@" ;;
*) die "no such verb: $verb" ;;
esac

# A server with the lab in it, and what the TAP tests do with it: statements in
# this session's place, calls in sessions of their own, and waiting for facts.
#
# Nothing here waits for a time: what has to have happened is asked for, up to
# PG_TEST_TIMEOUT_DEFAULT, so that a slow machine makes a test slow and no more.

package LabServer;

use strict;
use warnings;

use Exporter 'import';
use File::Spec;
use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

our @EXPORT = qw(start_server start_lab sql wait_for becomes comes_back start_call finish_call ends_well start_pgbench end_pgbench dump_of dump_in close_gate pid_of comes_back_after);

my $node;

# Starts a server of that name with these settings and the extension.  Returns
# the node; the other functions here are about it.
sub start_server
{
	my ($name, $settings) = @_;

	$node = LabNode->new($name);
	$node->init(allows_streaming => 1);
	$node->append_conf('postgresql.conf', "client_min_messages = warning\nlog_statement = none\n$settings");
	$node->start;
	sql('CREATE EXTENSION risky_migrations');
	return $node;
}

# The same with the lab in it, with so many rows.
sub start_lab
{
	my ($name, $rows, $settings) = @_;

	start_server($name, $settings);
	sql(q{CALL rm_migrate('0001')});
	sql("SELECT rm_seed($rows)");
	return $node;
}

# What the statements give; dies if one fails.
sub sql
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query);
}

# What pg_dump says of the definitions of what these arguments choose.
sub dump_of { return dump_in('postgres', @_) }

# The same in that database.
sub dump_in
{
	my ($database, @arguments) = @_;
	my ($out, $err);
	IPC::Run::run([ 'pg_dump', '-s', @arguments, $node->connstr($database) ], '>', \$out, '2>', \$err) or die $err;
	return $out =~ s/^--.*\n|^\\(?:un)?restrict .*\n//mgr;
}

# Waits until the condition, an SQL expression, is true; dies, with what
# is amiss, if it does not become so.
sub wait_for
{
	my ($condition, $amiss) = @_;
	$node->poll_query_until('postgres', "SELECT coalesce(($condition), false)") or die $amiss;
	return;
}

# The same as a test.
sub becomes
{
	my ($condition, $name) = @_;
	ok($node->poll_query_until('postgres', "SELECT coalesce(($condition), false)"), $name);
	return;
}

# Waits until a server that restarts by itself takes sessions again.  The query
# is not written to psql, which would not read it before it is refused.
sub comes_back
{
	my ($server) = @_;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return 1
		  if IPC::Run::run([ 'psql', '-XAtq', '-c', 'SELECT', '-d', $server->connstr('postgres') ],
			'<', File::Spec->devnull, '>', File::Spec->devnull, '2>', File::Spec->devnull);
		usleep(100_000);
	}
	return 0;
}

# The same after the death of one of its processes, for as soon as the postmaster
# knows of that it takes no sessions.
sub comes_back_after
{
	my ($pid) = @_;
	usleep(1_000) while kill 0, $pid;
	return comes_back($node);
}

# The process that runs a migration, or one of its helpers.
sub pid_of
{
	my ($which) = @_;
	return sql($which eq 'runner' ? 'SELECT running_pid FROM rm_migrations WHERE running_pid IS NOT NULL' :
		  q{SELECT min(pid) FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper'});
}

# A session that has this advisory lock, and so keeps those who ask for it from going on.
sub close_gate
{
	my ($gate) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_safe("SELECT pg_advisory_lock($gate)");
	return $session;
}

# Starts the statements, each as its own command, in a session of that
# application_name.
sub start_call
{
	my ($name, @statements) = @_;
	my %call = (out => '', err => '');
	local $ENV{PGAPPNAME} = $name;
	$call{handle} = IPC::Run::start(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-v', 'VERBOSITY=verbose',
			'-d', $node->connstr('postgres'), map { ('-c', $_) } @statements
		],
		'<', File::Spec->devnull, '>', \$call{out}, '2>', \$call{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return \%call;
}

# Waits for its end; true if all went well, and what it complained of is in
# its err.
sub finish_call
{
	my ($call) = @_;
	return eval { $call->{handle}->finish };
}

# The same as a test.
sub ends_well
{
	my ($call, $name) = @_;
	ok(finish_call($call), $name) or diag $call->{err};
	return;
}

# pgbench in short runs, one after the other, until end_pgbench(); the
# directory takes its output.  The arguments after it are pgbench's; with -R it
# leaves something of the processors to the tests beside.
sub start_pgbench
{
	my ($dir, @arguments) = @_;
	my %pgbench = (dir => $dir);

	unlink "$dir/stop", "$dir/out", "$dir/err";
	$pgbench{handle} = IPC::Run::start(
		[
			'sh', '-c', 'while test ! -e "$0"; do PGAPPNAME=pgbench "$@" || exit 1; done', "$dir/stop",
			'pgbench', '-n', '-t', '200', @arguments, $node->connstr('postgres')
		],
		'<', File::Spec->devnull, '>', "$dir/out", '2>', "$dir/err");
	return \%pgbench;
}

# True if no run of it failed.
sub end_pgbench
{
	my ($pgbench) = @_;
	PostgreSQL::Test::Utils::append_to_file("$pgbench->{dir}/stop", '');
	return $pgbench->{handle}->finish;
}

1;

# A snapshot that is older than what is waited for, and handed on meanwhile: the
# exchange waits for whoever has taken it over (SET TRANSACTION SNAPSHOT) as well, and
# that one finds the rows as they were.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_server('snapshots', 'autovacuum = off');
my $rows = 1000;

sql('CREATE TABLE elsewhere (n int)');

# A session that is in a transaction, and its process.
sub open_session
{
	my ($begin) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 1);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	$session->query_safe($begin);
	return ($session, $pid);
}

# What is waited for has this process in its reason; or else the step after this one is over.
sub waits_for
{
	my ($pid, $last, $name) = @_;
	my $waits = "EXISTS (SELECT FROM rm_progress WHERE waiting_for = 'snapshot' AND waiting_reason ~ 'process $pid\$')";

	wait_for("$waits OR EXISTS (SELECT FROM risky_migrations.step_log WHERE id > $last AND step IN ('swap', 'cut_over') AND state <> 'running')", 'nobody is waited for');
	ok(sql("SELECT $waits") eq 't', $name);
	return;
}

foreach my $method ('online_rewrite', 'three_step')
{
	sql(qq{
		DROP TABLE IF EXISTS t;
		CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL);
		INSERT INTO t SELECT g, g::text FROM generate_series(1, $rows) g;
	});
	# of three_step the backfill must be newer, of online_rewrite what is replayed
	sql("CALL rm_alter_type('t', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')") if $method eq 'online_rewrite';

	my ($exporter, $exporter_pid) = open_session('BEGIN ISOLATION LEVEL REPEATABLE READ');
	my $snapshot = $exporter->query_safe('SELECT pg_export_snapshot()');
	sql("UPDATE t SET v = '-1' WHERE id = 1");
	# from now on the oldest in progress, for all that comes
	my ($writer) = open_session('BEGIN; INSERT INTO elsewhere VALUES (1)');
	my $last = sql('SELECT coalesce(max(id), 0) FROM risky_migrations.step_log');
	my $call = start_call('runner', $method eq 'online_rewrite' ? 'CALL rm_cut_over(' . sql('SELECT max(id) FROM rm_migrations') . ')' :
		  "CALL rm_alter_type('t', 'v', 'int', 'v::int', method => 'three_step')");
	waits_for($exporter_pid, $last, "$method waits for a snapshot that was exported");

	# one with a new one is not waited for
	my ($other) = open_session('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
	my ($importer, $importer_pid) = open_session("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '$snapshot'");
	$exporter->query_safe('COMMIT');
	waits_for($importer_pid, $last, "$method waits for who has taken it over");
	is($importer->query_safe('SELECT count(*), sum(v::int), min(pg_typeof(v)::text) FROM t'),
		"$rows|" . ($rows * ($rows + 1) / 2) . '|text', "$method: that one finds the rows as they were");
	$importer->query_safe('COMMIT');
	ends_well($call, "$method: then it goes on, whoever else has a snapshot");
	$_->quit for $exporter, $importer, $other, $writer;
	is(sql('SELECT count(*), sum(v), min(pg_typeof(v)::text) FROM t'), "$rows|" . ($rows * ($rows + 1) / 2 - 2) . '|integer', "$method: to the end");
}

$node->stop;
done_testing();

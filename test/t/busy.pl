# Where others are busy a migration gives way: it rests where it had to wait for a
# processor, or others for the WAL that it writes in bulk; who verifies beside it does so,
# or goes; and each index is built by one process.
#
# The others are processes that only compute, more than there are processors, and sessions
# that commit, of which one is always waiting for the WAL (commit_delay).

use strict;
use warnings;

use IPC::Run;
use LabServer;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 1400;
my $node = start_server('busy', q{
autovacuum = off
fsync = on
commit_siblings = 0
min_parallel_table_scan_size = 0
max_parallel_maintenance_workers = 2
max_worker_processes = 8
log_min_messages = debug1
risky_migrations.lock_timeout = 100ms
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
});
my $helper = q{FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper'};

# A conversion that computes, so that a transaction does not end before it has to wait for
# a processor; and an index that is not built while the gate is closed.
sql(qq{
CREATE TABLE committed (n int);
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, filler text);
INSERT INTO t SELECT g, g::text, repeat('x', 1000) FROM generate_series(1, $rows) g;
CREATE FUNCTION slowly(v text) RETURNS int IMMUTABLE PARALLEL SAFE LANGUAGE plpgsql AS \$\$
DECLARE
	n int := 0;
BEGIN
	FOR i IN 1 .. 5000 LOOP
		n := n + i % 2;
	END LOOP;
	RETURN v::int;
END \$\$;
CREATE FUNCTION gate(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \$\$
BEGIN
	IF id = 1 THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN id;
END \$\$;
});

my $processors = grep { /^processor/ } slurp_file('/proc/cpuinfo') =~ /^.*$/mg;

my @computing;

sub take_processors
{
	@computing = map { IPC::Run::start([ $^X, '-e', '1 while 1' ]) } 1 .. 4 * $processors;
	return;
}

sub give_processors_back
{
	$_->kill_kill foreach splice @computing;
	return;
}

# also where the test ends before its time
END
{
	my $status = $?;
	give_processors_back();
	$? = $status;
}

# No rests any more, since other tests may take the processors too.
sub no_more
{
	my ($call, $name) = @_;
	give_processors_back();
	$node->reset_all;
	$node->set_for_all('risky_migrations.busy_rest = 0');
	ends_well($call, "$name: it goes on then");
	$node->reset_all;
	return;
}

sub rests
{
	my ($reason, $name) = @_;
	becomes("(SELECT waiting_for = 'pause' AND waiting_reason ~ '^$reason.*: it has rested for \\d+ ms, since risky_migrations.busy_rest is 100\$' FROM rm_progress)", $name);
	return;
}

# up to the cut-over
sub start_migration
{
	my ($batch, @settings) = @_;
	return start_call('runner', @settings, 'SET risky_migrations.range_pages = 1',
		"CALL rm_alter_type('t', 'v', 'integer', 'slowly(v)', method => 'online_rewrite', cut_over => 'manual', batch => $batch)");
}

# Processes that have been asked for at most for an index, of all that were built since.
sub builders
{
	my ($from) = @_;
	my $log = slurp_file($node->logfile, $from);
	my $serially = () = $log =~ /building index "shadow_\d+_\d+" on table "shadow_\d+_\d+" serially/g;
	my $in_parallel = () = $log =~ /building index "shadow_\d+_\d+" on table "shadow_\d+_\d+" with request for \d+ parallel worker/g;
	return "$serially|$in_parallel";
}

# Others commit
my $dir = $node->basedir;
append_to_file("$dir/commit.sql", "INSERT INTO committed VALUES (1);\n");
$node->set_for_all('risky_migrations.busy_rest = 100', 'commit_delay = 20000');
my $pgbench = start_pgbench($dir, '-c', 3, '-f', "$dir/commit.sql");
becomes('EXISTS (SELECT FROM committed)', 'WAL: others commit');
my $call = start_migration(100);
rests('others .*wait for the WAL', 'WAL: the copy rests');
ok(end_pgbench($pgbench), 'WAL: no commit has failed');
no_more($call, 'WAL');
sql('CALL rm_rollback()');

SKIP:
{
	skip 'the operating system does not tell who waits for a processor', 14 if !-r "/proc/$$/schedstat";

	# Others compute
	take_processors();
	sql(q{CALL rm_add_column('t', 'v', 'integer', 'v::integer')});
	$node->set_for_all('risky_migrations.busy_rest = 100');
	$call = start_call('runner', 'SET risky_migrations.max_row_lock_time = 5', 'CALL rm_backfill_batched(100)');
	rests('others use the processors', 'backfill: it rests');
	no_more($call, 'backfill');
	is(sql('SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::integer'), 0, 'backfill: every row is right');
	sql('CALL rm_rollback()');

	# it would have a helper beside it
	take_processors();
	$node->set_for_all('risky_migrations.busy_rest = 100');
	$call = start_migration(100);
	rests('others use the processors', 'copy: it rests');
	is(sql("SELECT step, (SELECT count(*) $helper) FROM rm_progress"), 'copy|0', 'copy: nobody verifies beside');

	# and other processes for the indexes
	$node->set_for_all('risky_migrations.busy_rest = 0.1');
	my $from = -s $node->logfile;
	becomes(q{(SELECT step NOT IN ('begin', 'copy', 'index') FROM rm_progress)}, 'index: they are built');
	is(builders($from), '1|0', 'index: by one process');
	no_more($call, 'index');
	sql('CALL rm_rollback()');

	$from = -s $node->logfile;
	ends_well(start_migration(10000, 'SET risky_migrations.busy_rest = 0'), 'index: where nobody is to be considered');
	is(builders($from), '0|1', 'index: it is built by several');
	sql('CALL rm_rollback()');

	# Two processes copy, so that one does not find everything verified.
	sql('CREATE INDEX ON t (gate(id))');
	my $gate = $node->background_psql('postgres');
	$gate->query_safe('SELECT pg_advisory_lock(1)');
	take_processors();
	$node->set_for_all('risky_migrations.busy_rest = 100');
	$call = start_migration(10000, 'SET risky_migrations.workers = 2');
	# if it did not rest, it would not wait for anything before there is nothing to do
	becomes("EXISTS (SELECT $helper AND wait_event_type = 'Extension')
		AND (SELECT step = 'index' FROM rm_progress)
		AND (SELECT sum(end_block - next_block) > 100 FROM risky_migrations.range)", 'beside the building: who verifies rests');
	$gate->quit;
	no_more($call, 'beside the building');
	sql('CALL rm_cut_over()');
	is(sql('SELECT count(*) FROM t WHERE v <> id'), 0, 'every row is right');
}

$node->stop;
done_testing();

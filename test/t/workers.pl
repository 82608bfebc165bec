# Several workers for the backfill and the verification: every row is right and
# counted once, whoever of them dies, is paused, cancelled or not to be had, and
# none outlives the runner.
#
# Nothing here depends on how fast anything is: the expression of most tests
# asks, in one row of a thousand, for an advisory lock.  While a session holds
# that (the gate is closed) each worker does what it can until it comes to such
# a row, and then tries again and again.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 60000;
my $node = start_server('workers', q{
autovacuum = off
max_worker_processes = 3
max_parallel_workers_per_gather = 0
restart_after_crash = on
log_min_messages = notice
risky_migrations.max_row_lock_time = 1ms
risky_migrations.lock_timeout = 20ms
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
risky_migrations.workers = 3
});

my $helpers = q{(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper')};
my $left = q{(SELECT count(*) FROM t WHERE v_new IS NULL)};

# A table of about 5000 pages, "v" of which is to become an int.
sql(q{
CREATE FUNCTION open(v text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF v::int % 1000 = 0 THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN v::int;
END $$;
CREATE FUNCTION failing(v text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') LIKE '% helper %' THEN
		RAISE EXCEPTION 'no such luck' USING ERRCODE = '58000', DETAIL = 'It is a helper.', HINT = 'Be lucky.';
	END IF;
	PERFORM pg_advisory_xact_lock_shared(1);
	RETURN v::int;
END $$;
});

sub make_table
{
	my ($fillfactor) = @_;
	$fillfactor //= 100;
	sql(qq{
DROP TABLE IF EXISTS t;
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, filler text) WITH (autovacuum_enabled = off, fillfactor = $fillfactor);
INSERT INTO t SELECT g, g::text, repeat('x', 600) FROM generate_series(1, $rows) g;
});
	return;
}

sub add_column
{
	my ($expression) = @_;
	sql("CALL rm_add_column('t', 'v', 'int', '" . ($expression // 'open(v)') . "')");
	return sql('SELECT max(id) FROM rm_migrations');
}

# What has to be so at the end of the backfill, and of the migration.
sub all_is_right
{
	my ($name, $id, $expected) = @_;
	is(sql("SELECT count(*), count(v_new), sum((v_new <> v::int)::int) FROM t"), "$rows|$rows|0", "$name: every row is right");
	is(sql('SELECT count(*) FROM risky_migrations.range'), 0, "$name: no range is left");
	is(sql("SELECT $helpers"), 0, "$name: no helper is left");
	is(sql("SELECT rows_done FROM risky_migrations.migration WHERE id = $id"), $rows, "$name: each row was counted once");
	sql("CALL rm_enforce_not_null($id)");
	is(sql("SELECT attnotnull FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'v_new'"), 't', "$name: verified");
	is(sql("SELECT sum(rows_changed) FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'enforce_not_null'"),
		0, "$name: nothing was to be mended");
	sql("CALL rm_rollback($id)");
	return;
}

# ---------------------------------------------------------------------------
# Three are at work, and what each does is seen and counted
# ---------------------------------------------------------------------------

make_table();
my $id = add_column();
my $gate = close_gate(1);
my $call = start_call('runner', "CALL rm_backfill_batched(1000, $id)");
becomes("$helpers = 2", 'two helpers beside the runner');
becomes('(SELECT workers FROM rm_progress) = 3', 'rm_progress says so');
becomes("(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3", 'each has taken a range');
is(sql(q{SELECT string_agg(DISTINCT usename, ',') FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper'}),
	sql('SELECT current_user'), 'as the role that has called it');
$gate->quit;
ends_well($call, 'the backfill ends');
is(sql("SELECT rows_changed, state FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'backfill'"),
	"$rows|done", 'the log counts what all have done');
is(sql(q{SELECT count(*), max(times) > 60000 / 1000 FROM risky_migrations.lock_report
	WHERE step = 'backfill' AND role = 'table' AND lock_mode = 'RowExclusiveLock'}), '1|t', 'so does the lock report');
all_is_right('three workers', $id);

# the verification is shared out as well, and finds what is wrong wherever it is
$id = add_column();
sql("CALL rm_backfill_batched(100000, $id)");
sql(q{
SET session_replication_role = replica;
ALTER TABLE t DISABLE TRIGGER ALL;
UPDATE t SET v_new = 0 WHERE id % 600 = 0;
});
sql(qq{ALTER TABLE t ENABLE ALWAYS TRIGGER "~rm_sync_$id"});
$gate = close_gate(1);
$call = start_call('runner', "CALL rm_enforce_not_null($id)");
becomes("$helpers = 2", 'the verification is shared out among three');
# (where the rows lie after the backfill is chance, so that no range may have a
# transaction that does not come to the gate)
becomes(q{EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
	WHERE locktype = 'advisory' AND NOT granted AND backend_type = 'risky_migrations helper')}, 'helpers are at work');
$gate->quit;
ends_well($call, 'the verification ends');
is(sql("SELECT rows_changed FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'enforce_not_null'"),
	$rows / 600, 'it has mended each row that was not equal, once');
is(sql('SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::int'), 0, 'wherever it was');
sql("CALL rm_rollback($id)");

# values that do not convert are recorded by whoever meets them
sql("UPDATE t SET v = 'x' WHERE id % 6000 = 0");
$id = add_column('v::int');
$call = start_call('runner', "CALL rm_backfill_batched(100000, $id)");
ok(finish_call($call), 'the backfill ends in spite of values that do not convert');
like($call->{err}, qr/10 rows hold values that do not convert/, 'and tells how many there are');
is(sql('SELECT count(*) FROM rm_conversion_errors'), 10, 'each is recorded');
$call = start_call('runner', "CALL rm_enforce_not_null($id)");
ok(!finish_call($call), 'the verification refuses them');
like($call->{err}, qr/10 rows of public.t have no new value/, 'and counts each once');
sql("CALL rm_rollback($id)");
make_table();

# ---------------------------------------------------------------------------
# Whoever dies
# ---------------------------------------------------------------------------

for my $case (
	[ 'a helper is terminated', 'helper', 'TERM' ],
	[ 'the runner is terminated', 'runner', 'TERM' ],
	[ 'a helper is killed', 'helper', 'KILL' ],
	[ 'the runner is killed', 'runner', 'KILL' ],
	[ 'the server is stopped at once', 'server', 'QUIT' ])
{
	my ($name, $whom, $signal) = @$case;

	$id = add_column();
	$gate = close_gate(1);
	# slow enough that it cannot be over before somebody dies
	$call = start_call('runner', 'SET risky_migrations.batch_pause = 500', "CALL rm_backfill_batched(1000, $id)");
	becomes("(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3", "$name: three are at work");
	my $pid = $whom eq 'server' ? undef : pid_of($whom);
	$gate->quit;
	wait_for("$left < $rows - 5000", 'nothing is done');
	my $done = sql("SELECT $rows - $left");
	if ($whom eq 'server')
	{
		$node->stop('immediate');
		finish_call($call);
		$node->start;
	}
	else
	{
		kill $signal, $pid;
		ok(comes_back_after($pid), "$name: the server is there");
		my $ended_well = finish_call($call);
		is($ended_well ? 1 : 0, $whom eq 'helper' && $signal eq 'TERM' ? 1 : 0, "$name: the call") or diag $call->{err};
	}
	note "$name: $done rows had been done";
	becomes("$helpers = 0", "$name: no helper is there any more");
	if (sql("SELECT steps_done FROM rm_migrations WHERE id = $id") == 1)
	{
		is(sql("SELECT last_step_state <> 'done' FROM rm_migrations WHERE id = $id"), 't', "$name: it is not done");
		sql("SET risky_migrations.workers = " . ($signal eq 'KILL' ? 1 : 3) . "; CALL rm_backfill_batched(1000, $id)");
	}
	all_is_right($name, $id);
}

# ---------------------------------------------------------------------------
# Errors, pauses, cancellations, holds
# ---------------------------------------------------------------------------

$id = add_column('failing(v)');
$gate = close_gate(1);
$call = start_call('runner', "CALL rm_backfill_batched(1000, $id)");
ok(!finish_call($call), 'an error of a helper ends the step');
like($call->{err}, qr/ERROR:  58000: no such luck\n.*DETAIL:  It is a helper\.\n.*HINT:  Be lucky\..*helper \d/s,
	'the caller is told all of it');
is(sql("SELECT last_step_state, sqlstate, message, detail, hint FROM rm_migrations WHERE id = $id"),
	'failed|58000|no such luck|It is a helper.|Be lucky.', 'and it is recorded');
is(sql("SELECT $helpers"), 0, 'no helper is left');
$gate->quit;
sql("SET risky_migrations.workers = 1; CALL rm_backfill_batched(1000, $id)");
is(sql('SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::int'), 0, 'alone it comes to its end');
sql("CALL rm_rollback($id)");

$id = add_column();
$gate = close_gate(1);
$call = start_call('runner', "CALL rm_backfill_batched(1000, $id)");
becomes("(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3", 'three are at work');
sql("SELECT rm_pause($id)");
becomes("$helpers = 0", 'a pause sends the helpers away');
my $done = sql("SELECT $left");
$gate->quit;
is(sql("SELECT $left"), $done, 'nobody goes on');
$gate = close_gate(1);
sql("SELECT rm_resume($id)");
becomes("$helpers = 2", 'with rm_resume they are back');
sql("SELECT rm_cancel($id)");
ok(!finish_call($call), 'cancelled');
like($call->{err}, qr/ERROR:  57014: migration $id was cancelled/, 'with its error');
is(sql("SELECT $helpers"), 0, 'when the call has ended no helper is left');
$gate->quit;

# what holds the runner holds the helpers
sql('CREATE TABLE hold (yes bool); INSERT INTO hold VALUES (false)');
$call = start_call('runner', q{SET risky_migrations.throttle_query = 'SELECT yes FROM hold'},
	"CALL rm_backfill_batched(1000, $id)");
wait_for("$helpers = 2 OR $left = 0", 'no helpers');
sql('UPDATE hold SET yes = true');
becomes("(SELECT waiting_for FROM rm_progress) = 'query' OR $left = 0", 'the runner holds');
SKIP:
{
	skip 'it was too fast', 1 if sql("SELECT $left") == 0;
	# a transaction that was under way may end
	becomes(q{NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper' AND backend_xid IS NOT NULL)},
		'the helpers rest');
	$done = sql("SELECT $left");
	is(sql("SELECT pg_sleep(1); SELECT $left"), "\n$done", 'nobody goes on');
}
sql('UPDATE hold SET yes = false');
ends_well($call, 'it goes on');
all_is_right('after pauses and holds', $id);

# ---------------------------------------------------------------------------
# A transaction that fails after many pages, each done at its first visit: the
# next one begins where that one began, and not where it came to
# ---------------------------------------------------------------------------

make_table(50);
for my $workers (1, 3)
{
	$id = add_column();
	$gate = close_gate(1);
	$call = start_call('runner', "SET risky_migrations.workers = $workers",
		q{SET risky_migrations.max_row_lock_time = '10 s'}, "CALL rm_backfill_batched(100000, $id)");
	becomes("(SELECT lock_retries > 0 FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'backfill')",
		"$workers at work: a transaction has failed");
	is(sql("SELECT $left"), $rows, 'nothing of it is there');
	$gate->quit;
	ends_well($call, 'it is tried again');
	is(sql("SELECT $left"), 0, 'from its first row on');
	sql("CALL rm_rollback($id)");
}
make_table();

# ---------------------------------------------------------------------------
# The ground moves
# ---------------------------------------------------------------------------

$id = add_column();
$gate = close_gate(1);
$call = start_call('runner', "CALL rm_backfill_batched(1000, $id)");
becomes("(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3", 'three are at work');
sql('DELETE FROM t WHERE id % 3 = 0; VACUUM FULL t');
$gate->quit;
ends_well($call, 'after VACUUM FULL it begins again');
is(sql('SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::int'), 0, 'and every row is right');
is(sql(q{SELECT max(relfilenode) = pg_relation_filenode('t') FROM risky_migrations.migration WHERE id = } . $id), 't', 'of the new file');
sql("CALL rm_enforce_not_null($id)");
sql("CALL rm_rollback($id)");

# Helpers that have done a part of their ranges, and rest, find ranges of the same
# numbers in the new file.  Which of them each takes then is chance.
for my $round (1 .. 4)
{
	$id = add_column('v::int');
	$node->set_for_all(q{risky_migrations.batch_pause = '1h'});
	$call = start_call('runner', "CALL rm_backfill_batched(6000, $id)");
	becomes("(SELECT waiting_for FROM rm_progress) = 'pause'", 'a part is done');
	becomes(q{NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper' AND backend_xid IS NOT NULL)},
		'and all rest');
	note sql(q{SELECT string_agg(format('%s: %s of %s by %s', number, next_block - first_block, end_block - first_block, worker), ', ' ORDER BY number) FROM risky_migrations.range});
	sql('VACUUM FULL t');
	sql('ALTER SYSTEM RESET risky_migrations.batch_pause');
	$node->reload;
	ends_well($call, 'after VACUUM FULL it begins again');
	is(sql('SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::int'), 0, 'and leaves no page out');
	sql("CALL rm_rollback($id)");
}

# leaves: one after the other, each shared out
sql(qq{
CREATE TABLE p (id int, v text NOT NULL, filler text) PARTITION BY RANGE (id);
CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (30001);
CREATE TABLE p2 (filler text, gone int, v text NOT NULL, id int);
ALTER TABLE p2 DROP COLUMN gone;
ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (30001) TO (60000);
CREATE TABLE p3 PARTITION OF p FOR VALUES FROM (60000) TO (70000);
INSERT INTO p SELECT g, g::text, repeat('x', 600) FROM generate_series(1, $rows) g;
});
sql(q{CALL rm_add_column('p', 'v', 'int', 'v::int')});
$call = start_call('runner', 'CALL rm_backfill_batched(1000)', 'CALL rm_enforce_not_null()');
ends_well($call, 'a partitioned table');
is(sql(q{SELECT count(*), count(v_new), sum((v_new <> v::int)::int) FROM p}), "$rows|$rows|0", 'every row of it is right');
is(sql(q{SELECT rows_changed, progress[2] = progress[3] FROM risky_migrations.step_log WHERE relation = 'public.p' AND step = 'backfill'}),
	"$rows|t", 'and counted once');
is(sql('SELECT count(*) FROM risky_migrations.range'), 0, 'no range is left');
sql('CALL rm_rollback()');

# ---------------------------------------------------------------------------
# Fewer workers than wanted, and roles
# ---------------------------------------------------------------------------

make_table();
$id = add_column();
$gate = close_gate(1);
$call = start_call('runner', 'SET risky_migrations.workers = 4', 'SET client_min_messages = notice',
	"CALL rm_backfill_batched(1000, $id)");
becomes('(SELECT workers FROM rm_progress) = 3', 'as many as there are (one of three is another worker of the server)');
$gate->quit;
ends_well($call, 'more workers wanted than there are');
like($call->{err}, qr/goes on with 3 of 4 workers/, 'it says so');
all_is_right('fewer workers', $id);

sql(q{
CREATE ROLE owner; CREATE ROLE login LOGIN; GRANT owner TO login; GRANT CREATE ON SCHEMA public TO owner;
ALTER TABLE t OWNER TO owner;
});
$id = sql(q{SET ROLE owner; CALL rm_add_column('t', 'v', 'int', 'open(v)'); SELECT max(id) FROM rm_migrations});
$gate = close_gate(1);
$call = start_call('runner', 'SET SESSION AUTHORIZATION login', 'SET ROLE owner', "CALL rm_backfill_batched(1000, $id)");
becomes(q{(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper' AND usename = 'login') = 2},
	'helpers connect as the session\'s user');
$gate->quit;
ends_well($call, 'and work as the owner');
all_is_right('an owner who may not log in', $id);
is(sql(q{SELECT owner::regrole FROM risky_migrations.step_log WHERE step = 'backfill' ORDER BY id DESC LIMIT 1}), 'owner', 'whose step it is');
my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\nCALL risky_migrations.help()");
like($err, qr/ERROR:  55000: risky_migrations.help\(\) can be called by a helper only/, 'nobody else can be a helper');

# without shared memory for a crew the runner does it alone
$node->append_conf('postgresql.conf', 'dynamic_shared_memory_type = mmap');
$node->restart;
$id = add_column('v::int');
my $shared = $node->data_dir . '/pg_dynshmem';
# no session could begin without it
$gate = close_gate(1);
$call = start_call('runner', 'SELECT pg_advisory_xact_lock(1)', 'SET client_min_messages = notice', "CALL rm_backfill_batched(1000, $id)");
wait_for(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)}, 'there is no runner');
rename $shared, "$shared.away" or die "rename: $!";
$gate->quit;
ends_well($call, 'no shared memory for helpers');
rename "$shared.away", $shared or die "rename: $!";
like($call->{err}, qr/step backfill goes on without helpers\nDETAIL:  could not open shared memory segment/, 'it says so');
all_is_right('no shared memory', $id);

# ---------------------------------------------------------------------------
# DROP EXTENSION
# ---------------------------------------------------------------------------

$id = add_column();
$gate = close_gate(1);
$call = start_call('runner', "CALL rm_backfill_batched(1000, $id)");
becomes("(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3", 'three are at work');
sql('DROP EXTENSION risky_migrations CASCADE');
ok(!finish_call($call), 'without the extension the step ends');
like($call->{err}, qr/ERROR:  42P01/, 'with its error');
is(sql("SELECT $helpers"), 0, 'and nobody of it is left');
is(sql('SELECT count(*), count(v) FROM t'), "$rows|$rows", 'the table is there');
$gate->quit;

$node->stop;
done_testing();

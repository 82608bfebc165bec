# online_rewrite with several workers: every row is right and there once, whoever of
# them fails, dies or is sent away while pages of it are in the shadow's file.
#
# As in workers.pl nothing depends on how fast anything is: the expression asks, in
# one row of many, for an advisory lock.  While a session holds that (the gate is
# closed) each worker does what it can until it comes to such a row, fails with all
# that its transaction has put into the file, and tries again. So there is one in each range.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 60000;
my $node = start_server('rewrite_workers', q{
autovacuum = off
max_worker_processes = 5
max_parallel_maintenance_workers = 0
restart_after_crash = on
risky_migrations.lock_timeout = 20ms
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
risky_migrations.workers = 3
risky_migrations.range_pages = 1024
});
my $dir = PostgreSQL::Test::Utils::tempdir;
my $helpers = q{(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper')};

# A table of about 5000 pages.  Every row says what its new value must be.
sql(q{
CREATE EXTENSION amcheck;
CREATE FUNCTION open(v text, every int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF v::int % every = 0 THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN v::int;
END $$;
});

sub make_table
{
	my ($kind) = @_;
	$kind //= '';
	sql(qq{
DROP TABLE IF EXISTS t;
CREATE $kind TABLE t (id int PRIMARY KEY, v text NOT NULL, want int NOT NULL, filler text) WITH (autovacuum_enabled = off);
INSERT INTO t SELECT g, g::text, g, repeat('x', 600) FROM generate_series(1, $rows) g;
CREATE INDEX t_want ON t (want, v);
});
	return;
}

# The call, in a session of its own, up to the cut-over, with a gate in one of so many rows.
sub start_migration
{
	my ($every, $batch, @settings) = @_;
	return start_call('runner', @settings,
		"CALL rm_alter_type('t', 'v', 'int', 'open(v, $every)', method => 'online_rewrite', cut_over => 'manual', batch => $batch)");
}

sub id_of { return sql('SELECT max(id) FROM rm_migrations') }
sub shadow_of { my ($id) = @_; return sql("SELECT shadow::regclass FROM risky_migrations.rewrite WHERE migration_id = $id") }

# So many of the shadow's pages are there, so many are good.
sub pages
{
	my ($id) = @_;
	return split /\|/, sql("SELECT pg_relation_size(shadow) / 8192, coalesce((SELECT sum(end_block - first_block)
		FROM risky_migrations.rewrite_chunk c WHERE c.shadow = r.shadow), 0) FROM risky_migrations.rewrite r WHERE migration_id = $id");
}

# It goes on, in the background, up to the cut-over.
sub resume
{
	my ($name, $id) = @_;
	sql("SELECT rm_resume($id)");
	becomes("(SELECT next_call = 'CALL rm_cut_over($id)' AND running_pid IS NULL FROM rm_migrations WHERE id = $id)", "$name: it goes on to its cut-over");
	return;
}

# What has to be so before the cut-over: the shadow is all that the table becomes.
sub shadow_is_right
{
	my ($name, $id) = @_;
	my $shadow = shadow_of($id);
	is(sql("SELECT count(*), count(DISTINCT id), sum((v <> want)::int) FROM $shadow"), "$rows|$rows|0", "$name: each row is in the shadow, once");
	is(sql("SELECT count(*) FROM verify_heapam('$shadow')"), 0, "$name: its pages are sound");
	is(sql("SELECT count(*) FILTER (WHERE after <> next) FROM (SELECT end_block AS after, lead(first_block, 1, end_block)
		OVER (ORDER BY first_block) AS next FROM risky_migrations.rewrite_chunk WHERE shadow = '$shadow'::regclass) c"), 0,
		"$name: each page of it is in one chunk");
	is(sql("SET enable_seqscan = off; SET enable_bitmapscan = off; SELECT count(id) FROM $shadow WHERE id > 0"), $rows, "$name: by the index too");
	return;
}

# And of the end.
sub all_is_right
{
	my ($name, $id, $count) = @_;
	$count //= $rows;
	sql("CALL rm_cut_over($id)");
	is(sql("SELECT count(*), sum((v <> want)::int), min(pg_typeof(v)::text) FROM t"), "$count|0|integer", "$name: every row is right");
	is(sql(q{SELECT count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 't'::regclass}), 2, "$name: and in every index");
	is(sql(q{SELECT count(*) FROM verify_heapam('t')}), 0, "$name: the pages are sound");
	is(sql("SELECT (SELECT count(*) FROM risky_migrations.range), (SELECT count(*) FROM risky_migrations.rewrite_chunk), $helpers"), '0|0|0',
		"$name: nothing is left");
	make_table();
	return;
}

# ---------------------------------------------------------------------------
# Three are at work
# ---------------------------------------------------------------------------

make_table();
my $gate = close_gate(1);
my $call = start_migration(5000, 400);
becomes("$helpers = 2", 'two helpers beside the runner');
becomes('(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3', 'each has taken a range');
my $id = id_of();
$gate->quit;
ends_well($call, 'the migration comes to its cut-over');
is(sql("SELECT rows_changed, state, progress[5] FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'copy'"), "$rows|done|$rows",
	'the log counts what all have copied');
shadow_is_right('three workers', $id);
all_is_right('three workers', $id);

# ---------------------------------------------------------------------------
# What a transaction has appended that failed
# ---------------------------------------------------------------------------

# 5000 rows are several chunks
$gate = close_gate(1);
$call = start_migration(5000, 100000);
wait_for("$helpers = 2", 'no helpers');
$id = id_of();
my $retries = q{(SELECT lock_retries FROM risky_migrations.step_log WHERE step = 'copy' ORDER BY id DESC LIMIT 1)};
becomes("$retries > 5", 'with the gate closed transactions fail');
my ($there, $good) = pages($id);
cmp_ok($there, '>', 3 * 128, 'they have put pages into the file of the shadow');
is($good, 0, 'none of them is good');
my $now = sql("SELECT $retries");
becomes("$retries > $now + 30", 'they are tried again');
cmp_ok((pages($id))[0], '<=', 3 * 3 * 128, 'on the same pages');

# the pages of the helpers lie where nobody comes back to them
my @pids = split /\n/, sql(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper'});
kill 'TERM', @pids;
foreach my $pid (@pids)
{
	wait_for("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid)", 'a helper stays');
}
$gate->quit;
ends_well($call, 'the others go on');
my ($empty, $pages) = split /\|/, sql("SELECT count(*), sum(end_block - first_block) FROM risky_migrations.rewrite_chunk WHERE copied AND end_row = 0");
cmp_ok($empty, '>', 0, 'pages are no good in the middle of the shadow');
note "$pages pages";
is(sql('SELECT count(*) FROM ' . shadow_of($id) . q{ s JOIN risky_migrations.rewrite_chunk c ON c.copied AND end_row = 0
	AND split_part(btrim(s.ctid::text, '()'), ',', 1)::int BETWEEN first_block AND end_block - 1}), 0, 'they are empty');
shadow_is_right('pages of those who failed', $id);
# what is written later may have these pages
sql("UPDATE t SET want = want + 1, v = v::int + 1 WHERE id % 10 = 0");
all_is_right('pages of those who failed', $id);

# at the end of the file they go away
$gate = close_gate(1);
$call = start_migration(5000, 100000);
wait_for("$helpers = 2", 'no helpers');
$id = id_of();
becomes("$retries > 5", 'transactions fail again');
becomes("(SELECT pg_relation_size(shadow) >= 3 * 128 * 8192 FROM risky_migrations.rewrite WHERE migration_id = $id)", 'there are pages');
sql("SELECT rm_cancel($id)");
ok(!finish_call($call), 'cancelled');
$node->set_for_all('risky_migrations.workers = 1');
my $last = sql('SELECT max(id) FROM risky_migrations.step_log');
sql("SELECT rm_resume($id)");
becomes("EXISTS (SELECT FROM risky_migrations.step_log WHERE id > $last AND step = 'copy' AND lock_retries > 5)", 'the next one goes on, alone');
cmp_ok((pages($id))[0], '<=', 3 * 128, 'and has cut them off');
$gate->quit;
becomes("(SELECT next_call = 'CALL rm_cut_over($id)' AND running_pid IS NULL FROM rm_migrations WHERE id = $id)", 'to the end');
sql('ALTER SYSTEM RESET risky_migrations.workers');
$node->reload;
shadow_is_right('cut off', $id);
all_is_right('cut off', $id);

# ---------------------------------------------------------------------------
# Whoever dies, beside writers
# ---------------------------------------------------------------------------

append_to_file("$dir/write.sql", qq{
\\set id random(1, $rows)
\\set x random(1, 1000000000)
UPDATE t SET v = :x, want = :x WHERE id = :id;
UPDATE t SET filler = 'y' WHERE id = :id;
});

for my $case (
	[ 'a helper is terminated', 'helper', 'TERM' ],
	[ 'the runner is terminated', 'runner', 'TERM' ],
	[ 'a helper is killed', 'helper', 'KILL' ],
	[ 'the runner is killed', 'runner', 'KILL' ],
	[ 'the server is stopped at once', 'server', 'QUIT' ])
{
	my ($name, $whom, $signal) = @$case;
	my $pgbench = start_pgbench($dir, '-R', '200', '-c', '2', '-f', "$dir/write.sql");

	$gate = close_gate(1);
	$call = start_migration(2000, 1000, 'SET risky_migrations.batch_pause = 100');
	becomes('(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3', "$name: three are at work");
	$id = id_of();
	my $pid = $whom eq 'server' ? undef : pid_of($whom);
	wait_for('(SELECT count(*) FROM risky_migrations.rewrite_chunk) > 2', 'nothing is done');
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
	}
	$gate->quit;
	finish_call($call);
	becomes("$helpers = 0", "$name: no helper is there any more");
	end_pgbench($pgbench);
	$pgbench = start_pgbench($dir, '-R', '200', '-c', '2', '-f', "$dir/write.sql");
	$node->set_for_all('risky_migrations.workers = ' . ($whom eq 'server' ? 1 : 3));
	resume($name, $id) if $whom ne 'helper' || $signal eq 'KILL';
	sql("CALL rm_cut_over($id)");
	ok(end_pgbench($pgbench), "$name: no writer fails later");
	is(sql("SELECT state FROM rm_migrations WHERE id = $id"), 'done', "$name: it comes to its end");
	is(sql("SELECT count(*), sum((v <> want)::int), min(pg_typeof(v)::text) FROM t"), "$rows|0|integer", "$name: every row is right");
	is(sql(q{SELECT count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 't'::regclass}), 2, "$name: and in every index");
	is(sql(q{SELECT count(*) FROM verify_heapam('t')}), 0, "$name: the pages are sound");
	is(sql("SELECT (SELECT count(*) FROM risky_migrations.range), (SELECT count(*) FROM risky_migrations.rewrite_chunk)"), '0|0', "$name: nothing is left");
	make_table();
}

sql('ALTER SYSTEM RESET risky_migrations.workers');
$node->reload;

# an unlogged table is empty after a crash, and so is the shadow
make_table('UNLOGGED');
$call = start_migration(2000, 1000, 'SET risky_migrations.batch_pause = 100');
wait_for('(SELECT count(*) FROM risky_migrations.rewrite_chunk) > 2', 'nothing is done');
$id = id_of();
$node->stop('immediate');
finish_call($call);
$node->start;
sql('INSERT INTO t SELECT g, g::text, g FROM generate_series(1, 100) g');
resume('unlogged', $id);
sql("CALL rm_cut_over($id)");
is(sql("SELECT count(*), sum((v <> want)::int), min(pg_typeof(v)::text) FROM t"), '100|0|integer', 'unlogged: only what came later is there');
make_table();

# ---------------------------------------------------------------------------
# The ground moves while helpers are at work
# ---------------------------------------------------------------------------

$gate = close_gate(1);
$call = start_migration(2000, 1000, 'SET client_min_messages = notice');
becomes('(SELECT count(DISTINCT worker) FROM risky_migrations.range) = 3', 'three are at work');
$id = id_of();
my $shadow = sql("SELECT shadow FROM risky_migrations.rewrite WHERE migration_id = $id");
sql('DELETE FROM t WHERE id % 3 = 0; VACUUM FULL t; INSERT INTO t SELECT g, g::text, g FROM generate_series(1, 60000) g WHERE g % 3 = 0');
$gate->quit;
ends_well($call, 'after VACUUM FULL it begins again');
like($call->{err}, qr/begins again: the table has other storage/, 'it says so');
is(sql("SELECT count(*) FROM risky_migrations.rewrite_chunk WHERE shadow = $shadow"), 0, 'nothing is known of the first shadow');
shadow_is_right('another file', $id);
all_is_right('another file', $id);

# ---------------------------------------------------------------------------
# The verification
# ---------------------------------------------------------------------------

sql('CREATE TABLE hold (step text)');
my $held = q{SET risky_migrations.throttle_query = 'SELECT true FROM hold h JOIN risky_migrations.step_log l USING (step) WHERE l.state = $$running$$'};

# Holds the migration under way as soon as it comes to that step.
sub held_at
{
	my ($step) = @_;
	sql("TRUNCATE hold; INSERT INTO hold VALUES ('$step')");
	becomes("EXISTS (SELECT FROM rm_progress WHERE step = '$step' AND waiting_for = 'query')", "held before $step");
	return;
}

# What was compared while the indexes were built (rewrite_beside.pl) is compared once more.
sub verify_all
{
	sql('UPDATE risky_migrations.rewrite_chunk SET rows_verified = NULL');
	return;
}

sql("INSERT INTO hold VALUES ('verify')");
$call = start_migration(2000, 100000, $held);
held_at('verify');
verify_all();
$gate = close_gate(1);
sql('TRUNCATE hold');
becomes("$helpers = 2", 'the verification is shared out among three');
becomes(q{EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
	WHERE locktype = 'advisory' AND NOT granted AND backend_type = 'risky_migrations helper')}, 'helpers are at work');
$gate->quit;
ends_well($call, 'it ends');
$id = id_of();
is(sql("SELECT progress[5], progress[2] = progress[3] FROM risky_migrations.step_log WHERE migration_id = $id AND step = 'verify'"), "$rows|t",
	'it has compared each row once');
all_is_right('verified by three', $id);

# finds what is wrong wherever it is, also on pages that nobody has copied; what has
# changed since is excused
sql("INSERT INTO hold VALUES ('catch_up')");
$call = start_migration(100000, 100000, $held);
held_at('catch_up');
$id = id_of();
$shadow = shadow_of($id);
sql("UPDATE t SET want = 5, v = 5 WHERE id % 1000 = 7; INSERT INTO t SELECT g, g::text, g, repeat('x', 600) FROM generate_series($rows + 1, $rows + 10000) g");
held_at('verify');
sql("UPDATE t SET want = 6, v = 6 WHERE id % 1000 = 9; INSERT INTO t SELECT g, g::text, g FROM generate_series($rows + 10001, $rows + 21000) g");
sql("SELECT rm_cancel($id); TRUNCATE hold");
finish_call($call);
foreach my $case (
	[ 'DELETE FROM shadow WHERE id = 30000', qr/row \(id\)=\(30000\) of public.t is not what it should be/, q{INSERT INTO shadow VALUES (30000, 30000, 30000, repeat('x', 600))} ],
	[ 'UPDATE shadow SET v = 1 WHERE id = 59999', qr/row \(id\)=\(59999\) of public.t is not what it should be/, 'UPDATE shadow SET v = want WHERE id = 59999' ],
	[ 'UPDATE shadow SET v = 1 WHERE id = 65000', qr/row \(id\)=\(65000\) of public.t is not what it should be/, 'UPDATE shadow SET v = want WHERE id = 65000' ],
	[ 'INSERT INTO shadow VALUES (-1, 1, 1)', qr/has a row \(id\)=\(-1\) that the table does not have/, 'DELETE FROM shadow WHERE id = -1' ],
	[ 'UPDATE shadow SET id = -2 WHERE id = 3', qr/row \(id\)=\(3\) of public.t is not|has a row \(id\)=\(-2\) that/, 'UPDATE shadow SET id = 3 WHERE id = -2' ])
{
	my ($break, $error, $mend) = @$case;

	# a new verification each time
	verify_all();
	sql("UPDATE risky_migrations.migration SET phase = 0 WHERE id = $id");
	sql($break =~ s/\bshadow\b/$shadow/r);
	$last = sql('SELECT max(id) FROM risky_migrations.step_log');
	sql("SELECT rm_resume($id)");
	wait_for("EXISTS (SELECT FROM risky_migrations.step_log WHERE id > $last AND step = 'verify' AND state IN ('failed', 'done'))", 'it does not look');
	like(sql("SELECT message FROM risky_migrations.step_log WHERE id > $last AND step = 'verify'"), $error, "it finds: $break");
	becomes("(SELECT running_pid IS NULL FROM rm_migrations WHERE id = $id)", 'and ends');
	sql($mend =~ s/\bshadow\b/$shadow/r);
}
sql("UPDATE risky_migrations.migration SET phase = 0 WHERE id = $id");
resume('after that', $id);
all_is_right('after that', $id, $rows + 21000);

$node->stop;
done_testing();

# online_rewrite verifies the shadow beside its copying and the building of its indexes:
# what counts as verified is so, whatever changes afterwards; and where nobody can be had
# for it the step verify does it all.
#
# Nothing depends on how fast anything is: an index asks for an advisory lock, and the
# expression for others.  While a session holds it (the gate is closed) its building,
# or the copying of row 18000, or a helper's looking at row 9000, fails and is tried again.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $rows = 21000;
my $node = start_server('rewrite_beside', q{
autovacuum = off
shared_buffers = 128MB
max_worker_processes = 5
max_parallel_maintenance_workers = 0
risky_migrations.range_pages = 128
risky_migrations.busy_rest = 0
risky_migrations.lock_timeout = 20ms
risky_migrations.lock_retries = 100000
risky_migrations.lock_retry_max_delay = 50ms
});
my $helpers = q{(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations helper')};
my $chunks = 'risky_migrations.rewrite_chunk';

# gate 1 is in the index, gate 2 in the expression
sql(q{
CREATE EXTENSION amcheck;
CREATE EXTENSION pg_buffercache;
CREATE FUNCTION gate(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF id = 1 THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN id;
END $$;
CREATE FUNCTION slow(v text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF v = '18000' THEN
		PERFORM pg_advisory_xact_lock_shared(2);
	ELSIF v = '9000' AND current_setting('application_name') LIKE '% helper %' THEN
		PERFORM pg_advisory_xact_lock_shared(3);
	END IF;
	RETURN v::int;
END $$;
});

# A table of more than 2500 pages, with room on each page of the first quarter; its last
# row has id 1.
sub make_table
{
	sql(qq{
DROP TABLE IF EXISTS t;
CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, filler text);
INSERT INTO t SELECT g, g::text, repeat('x', 1000) FROM generate_series(1, $rows) g;
DELETE FROM t WHERE id = 1 OR id < $rows / 4 AND id % 7 = 0;
INSERT INTO t VALUES (1, '1', '');
VACUUM t;
CREATE INDEX t_gate ON t (gate(id));
});
	return;
}

sub count_rows { return sql('SELECT count(*) FROM t') }
sub id_of { return sql('SELECT max(id) FROM rm_migrations') }
sub shadow_of { return sql('SELECT shadow::regclass FROM risky_migrations.rewrite') }

# Two processes copy, so nobody verifies beside that.
sub start_migration
{
	my (@settings) = @_;
	return start_call('runner', 'SET risky_migrations.workers = 2', @settings,
		"CALL rm_alter_type('t', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')");
}

# One copies, in some transactions.
sub start_copying
{
	return start_call('runner', @_,
		"CALL rm_alter_type('t', 'v', 'int', 'slow(v)', method => 'online_rewrite', cut_over => 'manual', batch => 2000)");
}

sub stops_before_cut_over
{
	my ($name, $id) = @_;
	becomes("(SELECT next_call = 'CALL rm_cut_over($id)' AND running_pid IS NULL FROM rm_migrations WHERE id = $id)", $name);
	return;
}

sub all_is_right
{
	my ($name, $id) = @_;
	my $count = count_rows();
	sql("CALL rm_cut_over($id)");
	is(sql(q{SELECT count(*), sum((v <> id)::int), min(pg_typeof(v)::text) FROM t}), "$count|0|integer", "$name: every row is right");
	is(sql(q{SELECT count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 't'::regclass}), 2, "$name: and in every index");
	is(sql("SELECT (SELECT count(*) FROM risky_migrations.range), (SELECT count(*) FROM $chunks), $helpers"), '0|0|0', "$name: nothing is left");
	make_table();
	return;
}

# The chunk of the shadow's row with that id; of the place that the table's row has.
sub chunk_of_shadow
{
	my ($id) = @_;
	my $shadow = shadow_of();
	return sql("SELECT c.first_block FROM $chunks c, $shadow s WHERE s.id = $id
		AND (s.ctid::text::point)[0] >= c.first_block AND (s.ctid::text::point)[0] < c.end_block");
}

sub chunk_of_table
{
	my ($id) = @_;
	return sql("SELECT c.first_block FROM $chunks c, t WHERE t.id = $id AND copied
		AND (t.ctid::text::point)[0] * 65536 + (t.ctid::text::point)[1] >= c.first_row
		AND (t.ctid::text::point)[0] * 65536 + (t.ctid::text::point)[1] < c.end_row");
}

# The shadow's last page may have room for what is replayed; so what is said of chunks is
# said of all before the last one.
my $last = "(SELECT max(first_block) FROM $chunks WHERE copied)";

# Up to where helpers have verified all that was copied, while the index cannot be built.
sub all_verified
{
	my ($name) = @_;
	becomes("(SELECT count(*) > 5 AND bool_and(rows_verified IS NOT NULL) FROM $chunks)", "$name: all is verified while the index is built");
	is(sql("SELECT sum(rows_verified) FROM $chunks"), count_rows(), "$name: all rows");
	return;
}

# These chunks were verified by the step verify; not all others were, though neighbours may
# be concerned.
sub anew
{
	my $changed = join ', ', @_;
	is(sql("SELECT bool_and(rows_verified IS NULL) FILTER (WHERE first_block IN ($changed)), count(rows_verified) > 5 FROM $chunks"),
		't|t', 'what was changed is verified anew, others are not');
	return;
}

# ---------------------------------------------------------------------------
# What changes is not verified any more, and only that
# ---------------------------------------------------------------------------

make_table();
my $gate = close_gate(1);
my $call = start_migration();
all_verified('beside the building');
my $id = id_of();
is(sql("SELECT step, $helpers FROM rm_progress"), 'index|1', 'it is done by a helper of the step index');
my $updated = chunk_of_shadow($rows - 3000);
my $deleted = chunk_of_shadow($rows / 2);
sql("UPDATE t SET v = v WHERE id = $rows - 3000; DELETE FROM t WHERE id = $rows / 2");
my $came_to = chunk_of_table($rows - 3000);
isnt($came_to, '', 'the new version of the row lies among rows that were copied');
isnt($came_to, $updated, 'in another chunk');
$gate->quit;
ends_well($call, 'the index is built, the table verified');
anew($updated, $deleted, $came_to);
all_is_right('beside the building', $id);

# ---------------------------------------------------------------------------
# Statistics are gathered beside the helpers, once unless they have become old
# ---------------------------------------------------------------------------

for my $old ('f', 't')
{
	$call = start_migration();
	ends_well($call, 'statistics: the table is verified');
	$id = id_of();
	is(sql("SELECT count(*) FROM pg_statistic WHERE starelid = '" . shadow_of() . "'::regclass"), 3, 'the shadow has statistics before the cut-over');
	sql("DELETE FROM pg_statistic WHERE starelid = '" . shadow_of() . "'::regclass");
	sql(q{UPDATE risky_migrations.rewrite SET analyzed = analyzed - '1 hour'::interval}) if $old eq 't';
	sql("CALL rm_cut_over($id)");
	is(sql(q{SELECT count(*) > 0 FROM pg_statistic WHERE starelid = 't'::regclass AND staattnum = 2}), $old,
		$old eq 't' ? 'old ones are gathered again by the cut-over' : 'fresh ones are taken as they are');
	make_table();
}

# Where nobody verifies beside, the step verify does that too.
$call = start_migration('SET risky_migrations.verify_beside = off');
ends_well($call, 'statistics: verified by the step');
is(sql("SELECT count(*) FROM pg_statistic WHERE starelid = '" . shadow_of() . "'::regclass"), 3, 'the shadow has statistics then too');
sql('CALL rm_rollback(' . id_of() . ')');

# ---------------------------------------------------------------------------
# What is wrong is found: where it was so before, and where a change takes back what
# was verified
# ---------------------------------------------------------------------------

$gate = close_gate(1);
$call = start_migration('SET risky_migrations.range_pages = 1000000');
becomes(q{(SELECT count(*) FROM pg_class WHERE relname LIKE 'shadow\_%' AND relkind = 'i') = 1}, 'the key is built, the gate is closed');
$id = id_of();
is(sql("SELECT count(rows_verified) FROM $chunks"), 0, 'a table that is too small for helpers is not verified beside');
sql('SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE running_pid IS NOT NULL');
finish_call($call);
my $shadow = shadow_of();
my $wrong = chunk_of_shadow($rows / 3);
sql("INSERT INTO $shadow VALUES (2 * $rows, 0, ''); UPDATE $shadow SET v = 0 WHERE id = $rows / 3");
my $surplus = chunk_of_shadow(2 * $rows);
isnt($surplus, '', 'a row too many is behind the rows of a chunk');
# its new version may be on a page behind all chunks
my $left = join ', ', grep { $_ ne '' } $wrong, $surplus, chunk_of_shadow($rows / 3);
sql("SELECT rm_resume($id)");
becomes("(SELECT bool_and((rows_verified IS NULL) = (first_block IN ($left))) FROM $chunks)", 'helpers leave alone what differs');
$gate->quit;
becomes("(SELECT message = 'row (id)=(' || $rows / 3 || ') of public.t is not what it should be in the shadow table' FROM rm_migrations WHERE id = $id)",
	'and the step verify says so');
sql("CALL rm_rollback($id)");

$gate = close_gate(1);
$call = start_migration();
all_verified('again');
$id = id_of();
$shadow = shadow_of();
my ($broken, $changed) = split /\n/, sql("SELECT s.id FROM $shadow s WHERE (s.ctid::text::point)[0] = (SELECT first_block FROM $chunks ORDER BY first_block OFFSET 3 LIMIT 1) ORDER BY s.ctid LIMIT 2");
sql("UPDATE $shadow SET v = 0 WHERE id = $broken; UPDATE t SET v = v WHERE id = $changed");
$gate->quit;
ok(!finish_call($call), 'what was verified and then replayed is verified again');
is(sql("SELECT message = 'row (id)=(' || $broken || ') of public.t is not what it should be in the shadow table' FROM rm_migrations WHERE id = $id"), 't',
	'and found wrong');
sql("CALL rm_rollback($id)");
make_table();

# ---------------------------------------------------------------------------
# Indexes are built with what is there
# ---------------------------------------------------------------------------

# Versions that a snapshot may still see are no reason to find values that are not unique; one
# that somebody has updated where it lies is found by its chain.
sql("UPDATE t SET filler = repeat('x', 200) WHERE id % 1000 = 550");
$gate = close_gate(1);
$call = start_migration();
all_verified('with versions');
$id = id_of();
my $reader = $node->background_psql('postgres');
$reader->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class');
$shadow = shadow_of();
sql("UPDATE $shadow SET v = v WHERE id % 1000 = 550");
is(sql(qq{CREATE EXTENSION pageinspect; SELECT count(*) > 0 FROM $shadow, LATERAL heap_page_items(get_raw_page('$shadow', (ctid::text::point)[0]::int)) i
	WHERE id = 19550 AND (i.t_infomask2 & 32768) <> 0}), 't', 'with versions: some are heap-only');
$gate->quit;
stops_before_cut_over('with versions', $id);
ends_well($call, 'with versions: the index is built');
sql("UPDATE t SET v = v WHERE id % 100 < 10; CREATE UNIQUE INDEX t_unique ON t (v, id)");
$call = start_call('cut_over', "CALL rm_cut_over($id)");
becomes("(SELECT waiting_for = 'snapshot' FROM rm_progress)", 'with versions: one more index is built, and the snapshot waited for');
is(sql(qq{SELECT count(*) FROM pg_index WHERE indrelid = '$shadow'::regclass}), 3, 'with versions: it is there');
$reader->query_safe('COMMIT');
$reader->quit;
ends_well($call, 'with versions: it is cut over');
is(sql(q{SELECT count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 't'::regclass}), 3, 'with versions: every row is in every index');
is(sql('SELECT sum((v <> id)::int) FROM t'), 0, 'with versions: and right');

# Nobody's pages have to leave shared_buffers for those of the shadow.
make_table();
$call = start_migration('SET risky_migrations.workers = 1');
ends_well($call, 'it is copied, indexed and verified');
$id = id_of();
$shadow = shadow_of();
my $pages = sql("SELECT pg_relation_size('$shadow') / 8192");
my $there = sql("SELECT count(*) FROM pg_buffercache WHERE relfilenode = pg_relation_filenode('$shadow')");
is(sql("SELECT $pages BETWEEN 2500 AND setting::int / 4 FROM pg_settings WHERE name = 'shared_buffers'"), 't', 'a scan of PostgreSQL would read all of the shadow into shared_buffers');
# each transaction has a few of its own
cmp_ok($there, '<', $pages / 2, 'ours do not');
all_is_right('with few buffers', $id);

# ---------------------------------------------------------------------------
# Helpers, and the runner, that go
# ---------------------------------------------------------------------------

$gate = close_gate(1);
$call = start_migration('SET risky_migrations.workers = 3');
all_verified('two helpers');
$id = id_of();
sql('SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE running_pid IS NOT NULL');
ok(!finish_call($call), 'the runner is terminated');
becomes("$helpers = 0", 'so do its helpers go');
$updated = chunk_of_shadow($rows - 3000);
my $count = sql("SELECT rows_verified - 1 FROM $chunks WHERE first_block = $updated");
sql("UPDATE t SET v = v WHERE id = $rows - 3000");
$came_to = chunk_of_table($rows - 3000);
sql("SELECT rm_resume($id)");
becomes("(SELECT bool_and(CASE first_block WHEN $updated THEN rows_verified = $count WHEN $came_to THEN rows_verified IS NULL ELSE rows_verified IS NOT NULL END) FILTER (WHERE first_block < $last) FROM $chunks)",
	'what is replayed at the beginning is verified beside again');
$gate->quit;
stops_before_cut_over('it goes on', $id);
all_is_right('terminated', $id);

# The pause of a runner sends them away, and they come again.
$gate = close_gate(1);
$call = start_migration();
all_verified('to be paused');
$id = id_of();
sql("SELECT rm_pause($id)");
becomes("(SELECT run_state = 'paused' FROM rm_migrations WHERE id = $id) AND $helpers = 0", 'a pause sends the helper away');
sql("SELECT rm_resume($id)");
$gate->quit;
ends_well($call, 'it goes on');
all_is_right('paused', $id);

# ---------------------------------------------------------------------------
# Beside the copying
# ---------------------------------------------------------------------------

# Up to where some time before the row that is not copied yet.
sub copied_is_verified
{
	my ($name) = @_;
	becomes("(SELECT sum(rows_verified) > 13000 FROM $chunks)", "$name: what is copied is verified");
	is(sql("SELECT step, $helpers FROM rm_progress"), 'copy|1', "$name: by a helper of the step copy");
	return;
}

my $copy_gate = close_gate(2);
$gate = close_gate(1);
$call = start_copying();
copied_is_verified('copying');
$id = id_of();
$updated = chunk_of_shadow(11000);
$deleted = chunk_of_shadow(9000);
sql("UPDATE t SET v = v WHERE id = 11000; DELETE FROM t WHERE id = 9000");
$came_to = chunk_of_table(11000);
isnt($came_to, '', 'the new version of the row lies among rows that were copied');
$copy_gate->quit;
# (but for less than what is worth a helper)
becomes("(SELECT coalesce(sum(end_block - first_block) FILTER (WHERE rows_verified IS NULL), 0) < 128 FROM $chunks) AND (SELECT step = 'index' FROM rm_progress)", 'the rest is verified beside the building');
$gate->quit;
ends_well($call, 'the index is built, the table verified');
anew($updated, $deleted, $came_to);
all_is_right('copying', $id);

# The runner is terminated, and one that has the copying shared out goes on.
$copy_gate = close_gate(2);
$call = start_copying();
copied_is_verified('terminated while copying');
$id = id_of();
sql('SELECT pg_terminate_backend(running_pid) FROM rm_migrations WHERE running_pid IS NOT NULL');
ok(!finish_call($call), 'the runner is terminated');
becomes("$helpers = 0", 'so does its helper go');
isnt(sql('SELECT count(*) FROM risky_migrations.range'), 0, 'what it was given is there');
sql("UPDATE t SET v = v WHERE id = 11000");
sql("SELECT rm_resume($id)");
becomes("(SELECT step = 'copy' FROM rm_progress) AND (SELECT count(*) = 0 FROM risky_migrations.range)", 'and is taken back');
$node->set_for_all('risky_migrations.workers = 2');
becomes('(SELECT ranges > 1 FROM risky_migrations.migration WHERE state = \'open\')', 'two workers share out what is left');
sql('ALTER SYSTEM RESET risky_migrations.workers');
$node->reload;
$copy_gate->quit;
stops_before_cut_over('it goes on', $id);
all_is_right('terminated while copying', $id);

# The copying is shared out while somebody verifies, who is not sent away yet (the runner is
# stopped, and what it would do is done here), and must not take what is to be copied.  (The
# gate keeps that one from having nothing to do, and from waiting for long.)
my $helper_gate = close_gate(3);
$copy_gate = close_gate(2);
$call = start_copying(q{SET risky_migrations.lock_timeout = '1ms'});
becomes(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 3 AND NOT granted)}, 'shared out: a helper verifies');
becomes(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 2 AND NOT granted)}, 'shared out: most is copied');
$id = id_of();
my $runner = pid_of('runner');
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	kill 'STOP', $runner;
	last if sql("SELECT count(*) FROM pg_locks WHERE pid = $runner AND locktype = 'relation'") == 0;
	kill 'CONT', $runner;
	usleep(5_000);
}
my $shared_out = q{
WITH gone AS (DELETE FROM risky_migrations.range RETURNING run, relid, relfilenode),
	now AS (UPDATE risky_migrations.migration SET ranges = 1 WHERE state = 'open' RETURNING id, next_block)
INSERT INTO risky_migrations.range (migration_id, number, relid, relfilenode, first_block, next_block, end_block, run)
SELECT DISTINCT id, 1000, relid, relfilenode, next_block, next_block, next_block + 10, run FROM gone, now};
sql($shared_out);
# it looks every 50 ms at most; a helper that is slower than this would not be seen
for (1 .. 40)
{
	last if sql('SELECT next_block > first_block FROM risky_migrations.range') eq 't';
	usleep(50_000);
}
is(sql('SELECT number, next_block - first_block, worker FROM risky_migrations.range'), '1000|0|', 'shared out: it does not take that');
sql(q{DELETE FROM risky_migrations.range; UPDATE risky_migrations.migration SET ranges = 0 WHERE state = 'open'});
kill 'CONT', $runner;
$_->quit foreach $copy_gate, $helper_gate;
ends_well($call, 'shared out: it goes on');
all_is_right('shared out', $id);

# ---------------------------------------------------------------------------
# Nobody is to be had
# ---------------------------------------------------------------------------

$node->append_conf('postgresql.conf', 'max_worker_processes = 0');
$node->restart;
my ($status, $out, $err) = $node->psql('postgres',
	"CALL rm_alter_type('t', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')");
is($status, 0, 'without background workers it works');
unlike($err, qr/helper|workers/, 'and nobody is told');
is(sql("SELECT count(rows_verified) FROM $chunks"), 0, 'nothing was verified beside');
is(sql("SELECT count(*) FROM pg_statistic WHERE starelid = '" . shadow_of() . "'::regclass"), 3, 'the shadow has statistics before the cut-over nevertheless');
all_is_right('alone', id_of());

$node->stop;
done_testing();

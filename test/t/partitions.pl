# Partitions that come and go while a column of their table changes, with writers
# beside: made empty, attached with rows in them, detached, dropped; between the
# steps, while things are built, and after the swap.
#
# Each row says in "truth" what its column "at" must hold, whatever type that has
# at the moment.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = start_server(
	'partitions', q{
max_worker_processes = 20
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});

sql(q{
CREATE TABLE p (id bigint, day int, at varchar(40) NOT NULL, truth text NOT NULL,
	PRIMARY KEY (day, at, id), CHECK (at <> '')) PARTITION BY RANGE (day);
CREATE INDEX ON p (at);
CREATE TABLE p0 PARTITION OF p FOR VALUES FROM (0) TO (10);
CREATE TABLE p1 (truth text NOT NULL, id bigint NOT NULL, at varchar(40) NOT NULL, day int NOT NULL, CONSTRAINT p_at_check CHECK (at <> ''));
CREATE INDEX "only here" ON p1 (at) WHERE id > 10;
ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (10) TO (20);
INSERT INTO p SELECT g, g % 20, t, t FROM generate_series(1, 20000) g,
	LATERAL (SELECT (timestamp '2024-01-01' + g * interval '1 s')::text AS t) x;
CREATE FUNCTION wrong() RETURNS bigint LANGUAGE plpgsql AS
	$$BEGIN RETURN count(*) FROM p WHERE at::timestamp IS DISTINCT FROM truth::timestamp; END$$;
CREATE FUNCTION lying_about() RETURNS text LANGUAGE sql AS
	$$SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^rm_[no]_'$$;
});

# the indexes of a table as what there are: what the parent has, each partition has
my $unattached = q{
SELECT string_agg(format('%s on %s', i.indexrelid::regclass, i.indrelid::regclass), ', ')
FROM pg_index i
WHERE i.indrelid IN (SELECT risky_migrations.members('p'::regclass)) AND i.indrelid <> 'p'::regclass
	AND i.indexrelid <> '"only here"'::regclass AND i.indexrelid::regclass::text !~ '^rm_o_'
	AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid)
	OR i.indrelid = 'p'::regclass AND NOT i.indisvalid};

sub is_right
{
	my ($type, $name) = @_;
	is(sql('SELECT wrong()'), 0, "$name: every row is right");
	is( sql(q{SELECT string_agg(DISTINCT format_type(atttypid, NULL), ', ') FROM pg_attribute
			WHERE attrelid IN (SELECT risky_migrations.members('p'::regclass)) AND attname = 'at'}),
		$type, "$name: in each partition the column is a $type");
	is(sql($unattached), '', "$name: all indexes are valid and attached");
	return;
}

my $dir = PostgreSQL::Test::Utils::tempdir;
append_to_file("$dir/write.sql", q{
\set id random(1, 20000)
\set s random(10, 23)
BEGIN;
UPDATE p SET at = '2025-01-:s 10:00:00', truth = '2025-01-:s 10:00:00' WHERE id = :id AND day = :id % 20;
INSERT INTO p (id, day, at, truth) VALUES (30000 + :client_id, :id % 20, '2026-01-:s 11:00:00', '2026-01-:s 11:00:00')
	ON CONFLICT DO NOTHING;
DELETE FROM p WHERE id = :id + 7 AND day = (:id + 7) % 20 AND id % 3 = 0;
END;
});

my $next = 20;

# a partition for what comes next, as is made each night
sub new_partition
{
	my $name = "p$next";
	sql(sprintf 'CREATE TABLE %s PARTITION OF p FOR VALUES FROM (%d) TO (%d)', $name, $next, $next + 10);
	sql("INSERT INTO p (id, day, at, truth) SELECT g, $next, '2024-05-05', '2024-05-05' FROM generate_series(1, 10) g");
	$next += 10;
	return $name;
}

# All at once beside writers, and partitions come and go all the time.
my $pgbench = start_pgbench($dir, '-R', '300', '-c', '3', '-f', "$dir/write.sql");
my $call = start_call('migration', q{CALL rm_alter_type('p', 'at', 'timestamp', 'at::timestamp')});
for (1 .. 5)
{
	usleep(150_000);
	sql("CREATE TABLE p$next PARTITION OF p FOR VALUES FROM ($next) TO (@{[$next + 10]})");
	usleep(150_000);
	sql("DROP TABLE p$next");
	$next += 10;
}
ends_well($call, 'beside writers, and partitions that come and go');
is_right('timestamp without time zone', 'after the swap');
my $new = new_partition();
$call = start_call('rollback', 'CALL rm_rollback()');
ends_well($call, 'and back, with another partition since the swap');
ok(end_pgbench($pgbench), 'no write was refused') or diag slurp_file("$dir/err");
is_right('character varying', 'after the way back');
is(sql('SELECT lying_about()'), '', 'nothing is left lying about');

# Step by step, with partitions that are attached with rows.
sub attach
{
	my ($new_column) = @_;
	sql("CREATE TABLE p$next (day int NOT NULL, $new_column, id bigint NOT NULL, truth text NOT NULL)");
	sql("INSERT INTO p$next SELECT $next, t.* FROM (" . join(' UNION ALL ', map { "SELECT $_[1]" =~ s/ID/$_/r } 1 .. 3) . ') t');
	sql("ALTER TABLE p ATTACH PARTITION p$next FOR VALUES FROM ($next) TO (@{[$next + 10]})");
	$next += 10;
	return;
}

sql(q{CALL rm_add_column('p', 'at', 'timestamp', 'at::timestamp')});
attach(q{at varchar(40) NOT NULL CONSTRAINT p_at_check CHECK (at <> ''), at_new timestamp}, q{'2024-03-01', NULL::timestamp, ID, '2024-03-01'});
sql('CALL rm_backfill_batched()');
attach(q{at varchar(40) NOT NULL CONSTRAINT p_at_check CHECK (at <> ''), at_new timestamp}, q{'2024-03-02', NULL::timestamp, ID, '2024-03-02'});
sql('CALL rm_enforce_not_null()');
is(sql('SELECT count(*) FROM p WHERE at_new IS DISTINCT FROM truth::timestamp'), 0, 'partitions attached with rows are filled or mended');

attach(q{at varchar(40) NOT NULL CONSTRAINT p_at_check CHECK (at <> ''), at_new timestamp NOT NULL}, q{'2024-03-03', '2000-01-01'::timestamp, ID, '2024-03-03'});
my ($status, $out, $err) = $node->psql('postgres', 'CALL rm_swap()');
like($err, qr/has been switched off for a while.*CALL rm_enforce_not_null\(\d+\) verifies/s, 'one attached with rows after that has to be verified');
sql('CALL rm_enforce_not_null()');
# an empty one needs nothing
sql("CREATE TABLE p$next PARTITION OF p FOR VALUES FROM ($next) TO (@{[$next + 10]})");
$next += 10;
sql("ALTER TABLE p DETACH PARTITION p1");
sql('CALL rm_swap()');
is(sql(q{SELECT count(*) FROM pg_class WHERE relname = 'only here'}), 1, 'one that was detached keeps what it has');
sql('DROP TABLE p1');
sub only_here { sql('CREATE INDEX "only here" ON p0 (truth)'); return; }
only_here();
is_right('timestamp without time zone', 'attached with rows');
attach(q{at timestamp NOT NULL CONSTRAINT p_at_check CHECK (at::text <> ''::text), at_old varchar(40)}, q{'2024-03-04'::timestamp, NULL, ID, '2024-03-04'});
sql("DROP TABLE $new");
sql('CALL rm_rollback()');
is_right('character varying', 'attached after the swap, and back');
is(sql('SELECT lying_about()'), '', 'nothing is left lying about');

# Switched off in one partition, after the swap: the way back is closed.
sql(q{CALL rm_alter_type('p', 'at', 'timestamp', 'at::timestamp')});
sql(q{DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE p0 DISABLE TRIGGER %1$I; ALTER TABLE p0 ENABLE ALWAYS TRIGGER %1$I', tgname)
	FROM pg_trigger WHERE tgrelid = 'p0'::regclass AND tgname ~ '^~rm_sync_'); END $$});
new_partition();
($status, $out, $err) = $node->psql('postgres', 'CALL rm_rollback()');
like($err, qr/the way back of migration \d+ is closed.*switched off/s, 'the trigger was switched off in one partition: the way back is closed');
sql('CALL rm_cleanup()');
is_right('timestamp without time zone', 'after the cleanup');
is(sql('SELECT count(*) FROM risky_migrations.leaf'), 0, 'no partition is remembered');

# Dropped while its lock is waited for, alone in the backfill and with all the
# others in the way back.
sub drop_while_waited_for
{
	my ($partition, $begin, $goes_on, $name) = @_;
	my $gate = $node->background_psql('postgres', on_error_stop => 0);

	$gate->query_safe('SELECT pg_advisory_lock(1)');
	my $begun = $begin->();
	my $keeper = start_call('keeper', 'BEGIN', "DROP TABLE $partition", 'SELECT pg_advisory_xact_lock(1)', 'COMMIT');
	wait_for(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)}, 'it is not dropped');
	$begun = $goes_on->() // $begun;
	wait_for(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'relation' AND NOT granted)}, 'nobody waits');
	$gate->quit;
	ends_well($keeper, "$name: dropped");
	ends_well($begun, "$name: and left out");
	return;
}

sql(q{
CREATE TABLE d (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE d1 PARTITION OF d FOR VALUES FROM (0) TO (20000);
CREATE TABLE d2 PARTITION OF d FOR VALUES FROM (20000) TO (30000);
CREATE TABLE d3 PARTITION OF d FOR VALUES FROM (30000) TO (40000);
INSERT INTO d SELECT g, g FROM generate_series(1, 39999) g;
CALL rm_add_column('d', 'v', 'int', 'v::int');
LOAD 'risky_migrations';
ALTER SYSTEM SET risky_migrations.batch_pause = '1h';
});
$node->reload;
drop_while_waited_for('d1', sub {
	my $c = start_call('runner', q{SET risky_migrations.lock_timeout = '60s'}, 'CALL rm_backfill_batched(1000)');
	wait_for(q{(SELECT waiting_for FROM rm_progress) = 'pause'}, 'it does not rest');
	return $c;
}, sub { sql('ALTER SYSTEM RESET risky_migrations.batch_pause'); $node->reload; return; }, 'in the backfill');
is(sql('SELECT count(*), count(v_new) FROM d'), '20000|20000', 'the others are filled');
drop_while_waited_for('d3', sub { return; }, sub {
	return start_call('runner', q{SET risky_migrations.lock_timeout = '60s'}, 'CALL rm_rollback()');
}, 'in the way back');
is(sql(q{SELECT string_agg(attname, ', ') FROM pg_attribute WHERE attrelid = 'd2'::regclass AND attnum > 2 AND NOT attisdropped}), '', 'and nothing is left');

# A foreign key that refers to a partitioned table cannot be built beforehand: it
# is tried before the swap, and proven after it.
sql(q{
CREATE TABLE orders (day int, id int, PRIMARY KEY (day, id)) PARTITION BY LIST (day);
CREATE TABLE orders_1 PARTITION OF orders FOR VALUES IN (1);
INSERT INTO orders SELECT 1, g FROM generate_series(1, 100) g;
CREATE TABLE line (day int, order_id int, CONSTRAINT fk FOREIGN KEY (day, order_id) REFERENCES orders);
INSERT INTO line SELECT 1, g FROM generate_series(1, 100) g;
});
my $fk = q{SELECT format('%s %s', convalidated, pg_get_constraintdef(oid)) FROM pg_constraint WHERE conrelid = 'line'::regclass AND conname = 'fk'};
my $proven = 't FOREIGN KEY (day, order_id) REFERENCES orders(day, id)';
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('orders', 'id', 'bigint', 'id + 1000')});
like($err, qr/the foreign key "fk" of public.line would not hold for the new values of public.orders/, 'one that would not hold is told before the swap');
sql('CALL rm_rollback()');
is(sql($fk), $proven, 'and is as before');
sql(q{CALL rm_alter_type('orders', 'id', 'bigint')});
is(sql($fk), $proven, 'it is proven when the step is done');
is(sql(q{SELECT bool_and(convalidated), count(*) FROM pg_constraint WHERE conrelid = 'line'::regclass AND contype = 'f'}), 't|2', 'with its part for the partition');

# as a crash between the exchange and the proof leaves it
my $unproven = q{
UPDATE pg_constraint SET convalidated = false WHERE conrelid = 'line'::regclass AND conname = 'fk';
UPDATE risky_migrations.migration SET steps_done = 4, phase = 7 WHERE state = 'open'};
sql($unproven);
is(sql(q{SELECT next_call ~ 'rm_(swap|resume)' FROM rm_migrations WHERE state = 'open'}), 't', 'interrupted before that, it goes on with the swap');
sql('CALL rm_swap()');
is(sql($fk), $proven, 'and proves it');
sql($unproven);
sql('CALL rm_rollback()');
is(sql($fk), $proven, 'or goes back, and proves the old one');
is(sql(q{SELECT count(*) || ' ' || pg_typeof(min(id)) FROM orders}), '100 integer', 'with the old column in force');

# What hangs on a partition's own column is known before the table is locked, and the
# partition gets a column then.
sql(q{
CREATE TABLE own (id int PRIMARY KEY, v int NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE own_1 PARTITION OF own FOR VALUES FROM (0) TO (1000);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER a_trigger BEFORE UPDATE OF v ON own_1 FOR EACH ROW EXECUTE FUNCTION nothing();
CREATE POLICY a_policy ON own_1 USING (v > 0);
INSERT INTO own SELECT g, g FROM generate_series(1, 100) g;
SET risky_migrations.lock_retries = 0;
CALL rm_alter_type('own', 'v', 'bigint', method => 'three_step');
});
is(sql(q{SELECT string_agg(tgattr::text, ', ') = (SELECT attnum::text FROM pg_attribute WHERE attrelid = 'own_1'::regclass AND attname = 'v')
	FROM pg_trigger WHERE tgname = 'a_trigger'}), 't', q{a partition's own trigger goes over});
is(sql(q{SELECT qual FROM pg_policies WHERE policyname = 'a_policy'}), '(v > 0)', 'and its policy');

$node->stop;
done_testing();

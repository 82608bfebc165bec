# Children that come and go while a column of their parent changes, with writers
# beside: made by CREATE TABLE ... INHERITS, attached with rows in them by ALTER
# TABLE ... INHERIT, taken away, put back, dropped; between the steps, while things
# are built, and after the swap.
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
	'inheritance', q{
max_worker_processes = 20
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});

# the parent has rows of its own, which nothing but its name tells from its children's
sql(q{
CREATE TABLE p (id bigint NOT NULL, at varchar(40) NOT NULL, truth text NOT NULL, PRIMARY KEY (id), CONSTRAINT fine CHECK (at <> ''));
CREATE INDEX ON p (at);
CREATE TABLE c1 (PRIMARY KEY (at, id)) INHERITS (p);
CREATE TABLE c2 (truth text NOT NULL, extra int, at varchar(40) NOT NULL, CONSTRAINT fine CHECK (at <> ''), UNIQUE (id)) INHERITS (p);
CREATE TABLE c3 () INHERITS (c1);
INSERT INTO p SELECT g, t, t FROM generate_series(1, 5000) g, LATERAL (SELECT (timestamp '2024-01-01' + g * interval '1 s')::text AS t) x;
INSERT INTO c1 SELECT id + 5000, at, truth FROM ONLY p;
INSERT INTO c2 (id, at, truth) SELECT id + 10000, at, truth FROM ONLY p;
INSERT INTO c3 SELECT id + 15000, at, truth FROM ONLY p;
CREATE FUNCTION wrong() RETURNS bigint LANGUAGE plpgsql AS
	$$BEGIN RETURN count(*) FROM p WHERE at::timestamp IS DISTINCT FROM truth::timestamp; END$$;
CREATE FUNCTION lying_about() RETURNS text LANGUAGE sql AS
	$$SELECT string_agg(n, ', ') FROM (SELECT relname FROM pg_class WHERE relname ~ '^rm_[no]_'
		UNION ALL SELECT conname FROM pg_constraint WHERE conname ~ '^rm_'
		UNION ALL SELECT tgname FROM pg_trigger WHERE tgname ~ '^~rm_'
		UNION ALL SELECT attrelid::regclass || '.' || attname FROM pg_attribute WHERE attname ~ '_(old|new)$' AND NOT attisdropped
			AND attrelid IN (SELECT risky_migrations.members('p'::regclass))) x (n)$$;
CREATE FUNCTION shape() RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(line, E'\n' ORDER BY line) FROM (
		SELECT format('%s %s %s %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull, attislocal, attinhcount)
		FROM risky_migrations.members('p'::regclass) m JOIN pg_attribute ON attrelid = m WHERE attnum > 0 AND NOT attisdropped
		UNION ALL SELECT format('%s %s', indrelid::regclass, pg_get_indexdef(indexrelid))
		FROM risky_migrations.members('p'::regclass) m JOIN pg_index ON indrelid = m WHERE indisvalid
		UNION ALL SELECT format('%s %s %s %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated, conislocal, coninhcount)
		FROM risky_migrations.members('p'::regclass) m JOIN pg_constraint ON conrelid = m) x (line)$$;
});
my $shape = sql('SELECT shape()');

sub is_right
{
	my ($type, $name) = @_;
	is(sql('SELECT wrong()'), 0, "$name: every row is right");
	is( sql(q{SELECT string_agg(DISTINCT format_type(atttypid, NULL) || attnotnull, ', ') FROM pg_attribute
			WHERE attrelid IN (SELECT risky_migrations.members('p'::regclass)) AND attname = 'at'}),
		$type . 'true', "$name: in each table the column is a $type, and NOT NULL");
	return;
}

my $dir = PostgreSQL::Test::Utils::tempdir;
append_to_file("$dir/write.sql", q{
\set id random(1, 20000)
\set s random(10, 23)
BEGIN;
UPDATE p SET at = '2025-01-:s 10:00:00', truth = '2025-01-:s 10:00:00' WHERE id = :id;
INSERT INTO c2 (id, at, truth) VALUES (30000 + :client_id, '2026-01-:s 11:00:00', '2026-01-:s 11:00:00')
	ON CONFLICT (id) DO UPDATE SET at = '2027-01-:s 11:00:00', truth = '2027-01-:s 11:00:00';
DELETE FROM p WHERE id = :id + 7 AND id % 3 = 0;
END;
});

# All at once beside writers, and children come and go all the time.
my $pgbench = start_pgbench($dir, '-R', '300', '-c', '3', '-f', "$dir/write.sql");
my $call = start_call('migration', q{CALL rm_alter_type('p', 'at', 'timestamp', 'at::timestamp')});
for my $n (1 .. 4)
{
	usleep(150_000);
	sql("CREATE TABLE n$n () INHERITS (@{[$n % 2 ? 'p' : 'c1']}); INSERT INTO n$n (id, at, truth) VALUES (40000, '2024-06-06', '2024-06-06')");
	usleep(150_000);
	sql("DROP TABLE n$n");
}
ends_well($call, 'beside writers, and children that come and go');
is_right('timestamp without time zone', 'after the swap');
sql(q{CREATE TABLE since () INHERITS (c1); INSERT INTO since (id, at, truth) SELECT g, '2024-05-05', '2024-05-05' FROM generate_series(1, 10) g});
is(sql(q{SELECT count(*) FROM pg_attribute a WHERE a.attname = 'at' AND a.attrelid IN ('p'::regclass, 'c1'::regclass, 'c2'::regclass, 'c3'::regclass)
	AND EXISTS (SELECT FROM pg_statistic s WHERE s.starelid = a.attrelid AND s.staattnum = a.attnum AND NOT s.stainherit)}), 4,
	'each table has statistics of the column');
$call = start_call('rollback', 'CALL rm_rollback()');
ends_well($call, 'and back, with another child since the swap');
ok(end_pgbench($pgbench), 'no write was refused') or diag slurp_file("$dir/err");
is_right('character varying', 'after the way back');
sql('DROP TABLE since');
is(sql('SELECT lying_about()'), '', 'nothing is left lying about');
is(sql('SELECT shape()'), $shape, 'the tables are what they were');

# Step by step, with children that are attached with rows.
my $next = 1;
sub attach
{
	my ($columns, $rows) = @_;
	sql("CREATE TABLE a$next (extra int, $columns, id bigint NOT NULL, truth text NOT NULL)");
	sql("INSERT INTO a$next SELECT 1, t.* FROM (" . join(' UNION ALL ', map { "SELECT $rows" =~ s/ID/$_/r } 1 .. 3) . ') t');
	sql("ALTER TABLE a$next INHERIT p");
	$next++;
	return;
}

my $old = q{at varchar(40) NOT NULL CONSTRAINT fine CHECK (at <> ''), at_new timestamp};
sql(q{CREATE TABLE away () INHERITS (p); CREATE TABLE further () INHERITS (away); INSERT INTO further SELECT 60001, '2024-02-02', '2024-02-02'});
sql(q{CALL rm_add_column('p', 'at', 'timestamp', 'at::timestamp')});
attach($old, q{'2024-03-01', NULL::timestamp, ID, '2024-03-01'});
sql('CALL rm_backfill_batched()');
is(sql(q{SELECT count(*), count(at_new) FROM a1}), '3|3', 'one that is attached with rows before the backfill is filled by it');
attach($old, q{'2024-03-02', NULL::timestamp, ID, '2024-03-02'});
sql('CALL rm_enforce_not_null()');
is(sql('SELECT count(*) FROM p WHERE at_new IS DISTINCT FROM truth::timestamp'), 0, 'one that is attached after it is mended by the verification');
attach($old, q{'2024-03-03', '2000-01-01'::timestamp, ID, '2024-03-03'});
# taken away, written without the trigger, and put back, which pg_inherits alone
# tells; and the same of one further down, by its parent
sql(q{ALTER TABLE a2 NO INHERIT p; UPDATE a2 SET at = '2024-03-04', truth = '2024-03-04'; ALTER TABLE a2 INHERIT p});
sql(q{ALTER TABLE away NO INHERIT p});
$node->safe_psql('postgres', q{UPDATE further SET at = '2024-03-05', truth = '2024-03-05'});
sql(q{ALTER TABLE away INHERIT p});
is(sql('SELECT count(*) FROM p WHERE at_new IS DISTINCT FROM truth::timestamp'), 3 + 3 + 1, 'those that have come, or have been away, have missed what was written');
# nobody is held to the shadow column before its trigger is there
sql(q{CREATE TABLE late () INHERITS (c1); INSERT INTO late (id, at, truth) VALUES (50001, '2024-07-07', '2024-07-07')});
sql(q{CREATE TABLE empty () INHERITS (c2)});
sql('ALTER TABLE a1 NO INHERIT p');
sql('CALL rm_swap()');
is_right('timestamp without time zone', 'attached with rows');
is(sql(q{SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'a1'::regclass AND attname = 'at'}), 'character varying', 'one that was taken away keeps what it has');
sql('DROP TABLE a1');
attach(q{at timestamp NOT NULL CONSTRAINT fine CHECK (at::text <> ''::text), at_old varchar(40)}, q{'2024-03-06'::timestamp, NULL, ID, '2024-03-06'});
sql('DROP TABLE a2');
sql('CALL rm_rollback()');
is_right('character varying', 'attached after the swap, and back');
is(sql('SELECT lying_about()'), '', 'nothing is left lying about, nor what who was attached had to bring');
sql('DROP TABLE a3, a4, late, empty, further, away');
is(sql('SELECT shape()'), $shape, 'the tables are what they were');

# Switched off in one child, after the swap: the way back is closed.
sql(q{CALL rm_alter_type('p', 'at', 'timestamp', 'at::timestamp')});
sql(q{DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE c3 DISABLE TRIGGER %1$I; ALTER TABLE c3 ENABLE ALWAYS TRIGGER %1$I', tgname)
	FROM pg_trigger WHERE tgrelid = 'c3'::regclass AND tgname ~ '^~rm_sync_'); END $$});
my ($status, $out, $err) = $node->psql('postgres', 'CALL rm_rollback()');
like($err, qr/the way back of migration \d+ is closed.*switched off/s, 'the trigger was switched off in one child: the way back is closed');
sql('CALL rm_cleanup()');
is_right('timestamp without time zone', 'after the cleanup');
is(sql('SELECT lying_about()'), '', 'nothing is left lying about');
is(sql('SELECT count(*) FROM risky_migrations.leaf'), 0, 'no table is remembered');

# Rows that do not convert: the same key may be in the parent and in a child, and
# NOT NULL in one of them only.
sql(q{
CREATE TABLE q (id int PRIMARY KEY, v text);
CREATE TABLE q1 (PRIMARY KEY (id)) INHERITS (q);
CREATE TABLE q2 (v text NOT NULL) INHERITS (q);
INSERT INTO q VALUES (1, 'x'), (2, '2'), (3, NULL);
INSERT INTO q1 VALUES (1, 'y');
INSERT INTO q2 VALUES (1, '1');
});
($status, $out, $err) = $node->psql('postgres', q{CALL rm_alter_type('q', 'v', 'int', 'nullif(v::int, 1)')});
like($err, qr/3 rows of public.q have no new value/, 'all rows without a new value are counted');
is(sql('SELECT string_agg(row_key || coalesce(value, \'\'), \', \' ORDER BY row_key COLLATE "C") FROM rm_conversion_errors'),
	'(id)=(1)x, public.q1 (id)=(1)y, public.q2 ctid=(0,1)1', 'and told apart, also where NOT NULL is a child\'s own');
sql(q{UPDATE q SET v = '5' WHERE id = 1; CALL rm_enforce_not_null(); CALL rm_swap(); CALL rm_cleanup()});
is(sql('SELECT string_agg(tableoid::regclass || \' \' || coalesce(v, 0), \', \' ORDER BY tableoid, v) FROM q'), 'q 2, q 5, q 0, q1 5, q2 5', 'mended and done');
is(sql(q{SELECT string_agg(attrelid::regclass::text, ', ') FROM pg_attribute WHERE attname = 'v' AND attnotnull AND attrelid IN (SELECT risky_migrations.members('q'::regclass))}),
	'q2', 'NOT NULL is where it was');

# A table that gets its first child in the middle of the migration.
sub first_child
{
	my ($name, $back, @steps) = @_;
	sql(q{DROP TABLE IF EXISTS f CASCADE; CREATE TABLE f (id int PRIMARY KEY, v int NOT NULL CHECK (v > 0));
		INSERT INTO f SELECT g, g FROM generate_series(1, 1000) g; CREATE INDEX ON f (v)});
	sql(join '; ', q{CALL rm_add_column('f', 'v', 'bigint', 'v + 1', reverse_expr => 'v - 1')}, @steps);
	sql('CREATE TABLE f1 () INHERITS (f)');
	my @rest = ('CALL rm_backfill_batched()', 'CALL rm_enforce_not_null()', 'CALL rm_swap()');
	sql(join '; ', @rest[@steps .. 2]) if @steps < 3;
	sql('INSERT INTO f1 (id, v) VALUES (5000, 7)') if !$back && @steps < 3;
	sql($back ? 'CALL rm_rollback()' : 'CALL rm_cleanup()');
	is(sql(q{SELECT sum(v) || ' ' || count(*) || ' ' || min(pg_typeof(v)::text) FROM f}),
		$back ? '500500 1000 integer' : @steps < 3 ? '501507 1001 bigint' : '501500 1000 bigint', $name);
	is(sql(q{SELECT string_agg(DISTINCT attname || attnotnull, ', ') FROM pg_attribute WHERE attrelid IN ('f'::regclass, 'f1'::regclass) AND attnum > 0 AND NOT attisdropped AND attname <> 'id'}),
		'vtrue', "$name: both have the one column");
	is(sql('SELECT lying_about()'), '', "$name: nothing is left lying about");
	return;
}
first_child('a first child after the column was added', 0);
first_child('a first child after the verification', 0, 'CALL rm_backfill_batched()', 'CALL rm_enforce_not_null()');
first_child('a first child after the swap, and the way back', 1, 'CALL rm_backfill_batched()', 'CALL rm_enforce_not_null()', 'CALL rm_swap()');
first_child('a first child after the swap, and the cleanup', 0, 'CALL rm_backfill_batched()', 'CALL rm_enforce_not_null()', 'CALL rm_swap()');

# One that is taken away and put back before each look: told, not tried for ever.
sql(q{
CREATE TABLE r (id int PRIMARY KEY, v int NOT NULL);
CREATE INDEX ON r (v);
INSERT INTO r SELECT g, g FROM generate_series(1, 1000) g;
CREATE TABLE r1 () INHERITS (r);
INSERT INTO r1 SELECT g, g FROM generate_series(1, 1000) g;
CALL rm_add_column('r', 'v', 'bigint');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
});
my $stands = q{SELECT last_step_state, sqlstate, steps_done, next_call FROM rm_migrations WHERE relation = 'public.r'};
my $restless = start_call('restless', qq{DO \$\$ BEGIN
	FOR i IN 1 .. 6000 LOOP
		ALTER TABLE r1 NO INHERIT r;
		ALTER TABLE r1 INHERIT r;
		COMMIT;
		PERFORM pg_sleep(0.005);
		EXIT WHEN EXISTS (SELECT FROM ($stands) s WHERE last_step_state = 'failed' OR steps_done = 5);
	END LOOP; END \$\$});
($status, $out, $err) = $node->psql('postgres', 'CALL rm_swap()');
like($err, qr/had to begin again 20 times.*come, or have been away.*next_call in rm_migrations.*or take everything back/s,
	'a child that comes and goes all the time: it says so');
ends_well($restless, 'the one who does that is not in its way');
like(sql($stands), qr/^failed\|55000\|[234]\|CALL rm_(enforce_not_null|swap)/, 'the state is true, and says what to call');
sql('CALL rm_enforce_not_null(); CALL rm_swap(); CALL rm_cleanup()');
is(sql(q{SELECT count(*) || ' ' || sum(v) || ' ' || min(pg_typeof(v)::text) FROM r}), '2000 1001000 bigint', 'once it stays it goes on');

$node->stop;
done_testing();

# Killed anywhere between the first step and the cleanup, or on the way back,
# the migration goes on from where it was.
#
# A table, plain, partitioned or with children, with indexes, a unique constraint, CHECKs and
# foreign keys is written by pgbench all the time.  Each row says in its column "truth" what its column
# "at" must hold, whatever type that has at the moment.  A session runs the
# whole migration; the server is killed after a random time, started again, and
# the migration taken to its end by what rm_migrations says to call next.  Then
# every row must be right, the indexes must hold what the table holds, the
# catalogs must be those of a plain ALTER TABLE, or on the way back those of the
# beginning, and nothing else may be left.

use strict;
use warnings;

use File::Spec;
use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $rounds = $ENV{RM_ROUNDS} // 3;
my $seed = $ENV{RM_SEED} // time;
srand($seed);
note "RM_SEED=$seed RM_ROUNDS=$rounds";

my $rows = 20_000;
my $node = LabNode->new('swap_crash');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
client_min_messages = warning
log_statement = none
max_worker_processes = 20
restart_after_crash = off
risky_migrations.lock_retries = 10000
risky_migrations.lock_retry_max_delay = 50
});
$node->start;

sub sql
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query);
}

# what makes the table one of that kind: in its definition, before it has rows, and after.
# (ALTER TABLE of PostgreSQL 18 refuses a child whose NOT NULL has another name.)
my %kinds = (
	plain => ['', '', ''],
	inherited => [
		'', q{
CREATE TABLE item_a (CONSTRAINT "A key" UNIQUE (at, id)) INHERITS (item);
CREATE TABLE item_b (at varchar(50) CONSTRAINT item_at_not_null NOT NULL, extra text, n int REFERENCES peer, UNIQUE (id), CHECK (at <> extra)) INHERITS (item);
CREATE TABLE item_c (CHECK (at <> 'c')) INHERITS (item_a);
CREATE INDEX item_c_at ON item_c (at);
}, q{
WITH moved AS (DELETE FROM ONLY item WHERE id % 4 = 1 RETURNING *) INSERT INTO item_a SELECT * FROM moved;
WITH moved AS (DELETE FROM ONLY item WHERE id % 4 = 2 RETURNING *) INSERT INTO item_b SELECT * FROM moved;
WITH moved AS (DELETE FROM ONLY item WHERE id % 4 = 3 RETURNING *) INSERT INTO item_c SELECT * FROM moved;
}],
	partitioned => [
		'PARTITION BY RANGE (id)', qq{
CREATE TABLE item_0 PARTITION OF item FOR VALUES FROM (MINVALUE) TO (5000);
CREATE TABLE item_1 PARTITION OF item FOR VALUES FROM (5000) TO ($rows) PARTITION BY HASH (id);
CREATE TABLE item_1_0 PARTITION OF item_1 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE item_1_1 PARTITION OF item_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE item_rest PARTITION OF item DEFAULT;
}, '']);
my $kind;

my $setup = qq{
CREATE TABLE peer (id int PRIMARY KEY);
INSERT INTO peer SELECT generate_series(1, 100);
CREATE TABLE item (id bigserial PRIMARY KEY, at varchar(50) NOT NULL, truth text NOT NULL, n int REFERENCES peer,
	CONSTRAINT "once only" UNIQUE (at, id), CHECK (at IS NOT NULL AND n > 0)) %s;
%s
INSERT INTO item (at, truth, n)
	SELECT t, t, 1 + g %% 100 FROM generate_series(1, $rows) g,
		LATERAL (SELECT (timestamp '2024-01-01' + g * interval '1 s')::text AS t) x;
%s
CREATE INDEX item_at ON item (at DESC) INCLUDE (n);
CREATE INDEX item_some ON item (n) WHERE at IS NOT NULL;
CREATE STATISTICS item_st ON at, n FROM item;
COMMENT ON COLUMN item.at IS 'when';
};

my $dir = PostgreSQL::Test::Utils::tempdir;
PostgreSQL::Test::Utils::append_to_file(
	"$dir/write.sql", qq{
\\set id random(1, $rows)
\\set day random(10, 28)
\\set n random(1, 100)
BEGIN;
UPDATE item SET at = '2025-01-:day 10:00:00', truth = '2025-01-:day 10:00:00', n = :n WHERE id = :id;
INSERT INTO item (at, truth, n) VALUES ('2026-02-:day 11:00:00', '2026-02-:day 11:00:00', :n);
DELETE FROM item WHERE id = :id + 7 AND id % 3 = 0;
END;
});

# what is known of the table in the catalogs, without what is in its rows
my $shape = q{
SELECT string_agg(line, E'\n' ORDER BY line) FROM (
	SELECT format('column %s %s %s %s %s %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull,
		attinhcount, attislocal, col_description(attrelid, attnum), pg_get_expr(adbin, adrelid))
	FROM risky_migrations.members('item'::regclass) m JOIN pg_attribute ON attrelid = m
	LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
	WHERE attnum > 0 AND NOT attisdropped
	UNION ALL SELECT format('index %s %s %s', pg_get_indexdef(indexrelid), indisvalid, inhparent::regclass)
	FROM risky_migrations.members('item'::regclass) m JOIN pg_index ON indrelid = m LEFT JOIN pg_inherits ON inhrelid = indexrelid
	UNION ALL SELECT format('constraint %s %s %s %s %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated,
		coninhcount, conislocal, conparentid <> 0)
	FROM risky_migrations.members('item'::regclass) m JOIN pg_constraint ON conrelid = m
	UNION ALL SELECT format('trigger %s', tgname) FROM pg_trigger WHERE tgrelid IN (SELECT risky_migrations.members('item'::regclass)) AND NOT tgisinternal
	UNION ALL SELECT format('statistics %s', stxname) FROM pg_statistic_ext WHERE stxrelid = 'item'::regclass
	UNION ALL SELECT format('relation %s', relname) FROM pg_class WHERE relname ~ '^rm_[a-z]+_[0-9]') f (line)};

sub make_table
{
	# DROP TABLE locks indexes first, and so gets into a deadlock with autovacuum's ANALYZE
	sql(q{BEGIN; DO $$ BEGIN IF to_regclass('item') IS NOT NULL THEN LOCK TABLE item; END IF; END $$;
		DROP TABLE IF EXISTS item, peer CASCADE; COMMIT; DELETE FROM risky_migrations.migration; } . sprintf($setup, @{ $kinds{$kind} }));
	return;
}

# starts pgbench in the background, until the server goes or it is stopped
sub start_writers
{
	local $ENV{PGAPPNAME} = 'pgbench';
	return IPC::Run::start(
		[ 'pgbench', '-n', '-R', '300', '-c', '3', '-T', '600', '-f', "$dir/write.sql", $node->connstr('postgres') ],
		'<', File::Spec->devnull, '>', File::Spec->devnull, '2>', "$dir/pgbench.err");
}

sub stop_writers
{
	my ($pgbench, $name) = @_;
	# it may not even have come to its sessions
	$node->poll_query_until('postgres', q{SELECT count(*) = 3 FROM pg_stat_activity WHERE application_name = 'pgbench'})
	  or die 'pgbench does not write';
	sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'});
	$pgbench->finish;
	unlike(slurp_file("$dir/pgbench.err"), qr/ERROR:/, "$name: no write was refused");
	return;
}

# Calls the statements one after the other in a session of its own.
sub start_calls
{
	my (@statements) = @_;
	my %call = (out => '', err => '');
	$call{handle} = IPC::Run::start(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'),
			map { ('-c', $_) } @statements
		],
		'<', File::Spec->devnull, '>', \$call{out}, '2>', \$call{err},
		IPC::Run::timeout(4 * $PostgreSQL::Test::Utils::timeout_default));
	return \%call;
}

# Goes on by what the view says, until it says nothing more or $stop is reached.
sub go_on
{
	my ($back) = @_;
	for (1 .. 20)
	{
		my $next = sql(q{SELECT coalesce(next_call, state) FROM rm_migrations ORDER BY id DESC LIMIT 1});
		return $next unless $next =~ /^CALL/;
		$next =~ s/rm_\w+\(.*?(\d+)\)$/rm_rollback($1)/ if $back;
		my $call = start_calls($next);
		$call->{handle}->finish or return "$next: $call->{err}";
	}
	return 'no end';
}

sql('CREATE EXTENSION risky_migrations; CREATE EXTENSION amcheck');
foreach (sort keys %kinds)
{
	$kind = $_;
	make_table();
	my $before = sql($shape);
	sql(q{ALTER TABLE item ALTER at TYPE timestamp USING at::timestamp});
	my $altered = sql($shape);

	my @forth = (
		q{CALL rm_add_column('item', 'at', 'timestamp', 'at::timestamp')},
		'CALL rm_backfill_batched(2000)', 'CALL rm_enforce_not_null()', 'CALL rm_swap()');

	# how long it takes undisturbed
	make_table();
	my $writers = start_writers();
	my $started = Time::HiRes::time();
	my $call = start_calls(@forth, 'CALL rm_cleanup()');
	ok($call->{handle}->finish, "$kind, undisturbed: it runs beside the writers") or diag $call->{err};
	my $seconds = Time::HiRes::time() - $started;
	stop_writers($writers, "$kind, undisturbed");
	is(sql($shape), $altered, "$kind, undisturbed: as after ALTER TABLE");

	my %killed;
	for my $round (1 .. $rounds)
	{
		my $back = $round % 2 == 0;
		make_table();
		$writers = start_writers();
		my $call = start_calls(@forth, $back ? 'CALL rm_rollback()' : 'CALL rm_cleanup()');
		my $after = rand($seconds * ($back ? 1.5 : 1.1));
		usleep($after * 1_000_000);
		$node->stop('immediate');
		eval { $call->{handle}->finish };
		$writers->finish;
		unlike(slurp_file("$dir/pgbench.err"), qr/ERROR:/, 'no write was refused before');
		$node->start;

		my $at = sql(q{SELECT coalesce((SELECT last_step || ' ' || last_direction || ' ' || last_step_state
			FROM rm_migrations ORDER BY id DESC LIMIT 1), 'nothing')});
		$killed{$at}++;
		my $name = sprintf '%s, killed after %.2f s, %s%s', $kind, $after, $at, $back ? ', then back' : '';
		if ($at eq 'nothing')
		{
			is(sql($shape), $before, "$name: as before");
			next;
		}
		$writers = start_writers();
		my $end = go_on($back);
		stop_writers($writers, $name);

		my $done = $end eq 'done';
		like($end, qr/^(done|rolled back)$/, "$name: comes to an end");
		is(sql($shape), $done ? $altered : $before, "$name: the catalogs of " . ($done ? 'ALTER TABLE' : 'the beginning'));
		is(sql('SELECT count(*) FROM item WHERE at::timestamp IS DISTINCT FROM truth::timestamp'), 0, "$name: every row is right");
		is( sql(q{SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam,
				LATERAL (SELECT bt_index_check(c.oid, true)) x WHERE i.indrelid IN (SELECT risky_migrations.members('item'::regclass))
				AND c.relkind = 'i' AND a.amname = 'btree'}) > 3,
			1, "$name: the indexes hold what the table holds");
	}
	note join ', ', map { "$_: $killed{$_}" } sort keys %killed;
}

$node->stop;
done_testing();

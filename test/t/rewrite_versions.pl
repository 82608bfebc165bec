# Transactions that took their snapshot before the cut-over of online_rewrite and come
# to the table after it: they find the rows as they were then.
#
# A session holds the table, so that the cut-over, which has waited for older
# snapshots, tries for its lock again and again.  Meanwhile rows are changed in every
# way, and between the changes others begin, who read the table only after the
# exchange.  Each change is made to the table and to "truth"; whatever a snapshot
# sees of the one it must see of the other.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = start_server('rewrite_versions', q{
autovacuum = off
max_connections = 40
max_prepared_transactions = 2
risky_migrations.lock_timeout = 50
risky_migrations.lock_retries = 10000
risky_migrations.lock_retry_max_delay = 20
});
sql('CREATE EXTENSION amcheck');

sub make_table
{
	sql(q{
		DROP TABLE IF EXISTS w, truth;
		CREATE TABLE w (id varchar(20), v varchar(20) NOT NULL, u int UNIQUE, big text, PRIMARY KEY (id));
		ALTER TABLE w ALTER big SET STORAGE EXTERNAL;
		INSERT INTO w SELECT g, g, g, CASE WHEN g % 10 = 0 THEN repeat(md5(g::text), 100) END FROM generate_series(1, 300) g;
		CREATE INDEX w_v ON w (v, id);
		CREATE INDEX w_some ON w ((v IS NULL), u) WHERE u % 2 = 0;
		CREATE TABLE truth AS SELECT * FROM w;
	});
	return;
}

# the statements, once with the table's name and once with that of the truth
sub change
{
	my ($change) = @_;
	my ($w, $truth) = map { my $name = $_; $change =~ s/\bT\b/$name/gr } 'w', 'truth';
	sql("BEGIN; SET CONSTRAINTS ALL DEFERRED; $w; $truth; COMMIT");
	return;
}

my @changes = (
	q{UPDATE T SET v = '1000' WHERE id = '1'; DELETE FROM T WHERE id = '2'; INSERT INTO T VALUES ('1001', '1001', 1001, repeat('x', 3000))},
	q{UPDATE T SET v = '2000', big = repeat('y', 4000) WHERE id IN ('1', '10', '1001')},
	q{UPDATE T SET u = -u WHERE id IN ('3', '4'); UPDATE T SET u = 7 - abs(u) WHERE id IN ('3', '4')},
	q{UPDATE T SET id = '1005', v = '5' WHERE id = '5'; UPDATE T SET id = '5' WHERE id = '6'},
	q{DELETE FROM T WHERE id = '7'; INSERT INTO T VALUES ('7', '77', 7, NULL); UPDATE T SET v = '78' WHERE id = '7'},
	q{SAVEPOINT a; UPDATE T SET v = '8' WHERE id = '8'; SAVEPOINT b; UPDATE T SET v = '88' WHERE id = '8'; RELEASE b; UPDATE T SET v = '888' WHERE id = '8'; RELEASE a;
		SAVEPOINT c; UPDATE T SET v = '9' WHERE id = '9'; DELETE FROM T WHERE id = '11'; ROLLBACK TO c},
	q{UPDATE T SET v = v WHERE id = '1'; DELETE FROM T WHERE id = '1001'},
	q{INSERT INTO T VALUES ('1001', '3', 1001, repeat('z', 3000)); UPDATE T SET v = '4000' WHERE id = '1'},
	q{PERFORM_LOCKS},
	q{UPDATE T SET v = v || '0' WHERE u % 3 = 0},
	q{UPDATE T SET big = NULL WHERE id = '10'; DELETE FROM T WHERE u % 7 = 0});

my @witnesses;

# one more who has a snapshot, and has not come to the table
sub begin_witness
{
	my ($level) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query("BEGIN ISOLATION LEVEL $level; SELECT 1");
	push @witnesses, $session;
	return;
}

my $compare = q{SELECT count(*) || ' of ' || (SELECT count(*) FROM truth) FROM w FULL JOIN truth t ON t.id = w.id::text
	WHERE ROW(w.v::text, w.u, w.big) IS DISTINCT FROM ROW(t.v, t.u, t.big) OR w.id IS NULL OR t.id IS NULL};

sub check
{
	my ($what) = @_;
	like(sql($compare), qr/^0 of/, "$what: every row is right");
	is(sql("SELECT count(*), count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 'w'::regclass"), '4|4', "$what: and in every index");
	is(sql("SELECT count(*) FROM verify_heapam('w')"), '0', "$what: and the pages are sound");
	return;
}

# The column changes, and all the while somebody holds the table; with each change
# a witness begins.
sub run
{
	my ($column, $crash) = @_;
	make_table();
	sql(qq{CALL rm_alter_type('w', '$column', 'int', '$column\::int', method => 'online_rewrite', cut_over => 'manual')});
	my $id = sql('SELECT max(id) FROM risky_migrations.migration');
	change(q{UPDATE T SET v = v || '1' WHERE u % 5 = 0});
	my $holder = $node->background_psql('postgres', on_error_stop => 0);
	$holder->query('BEGIN; LOCK TABLE w IN ACCESS SHARE MODE');
	my $call = start_call('cut over', "CALL rm_cut_over($id)");
	wait_for('EXISTS (SELECT FROM rm_progress WHERE lock_retries > 0)', 'the cut-over does not try for its lock');
	foreach my $n (0 .. $#changes)
	{
		begin_witness($n % 2 ? 'SERIALIZABLE' : 'REPEATABLE READ');
		if ($changes[$n] eq 'PERFORM_LOCKS')
		{
			# row locks: of several at once, and one who changes the row beside one
			my $locker = $node->background_psql('postgres', on_error_stop => 0);
			$locker->query(q{BEGIN; SELECT FROM w WHERE id IN ('12', '13', '15') FOR KEY SHARE});
			change(q{UPDATE T SET v = '12' WHERE id = '12'});
			sql(q{BEGIN; SELECT FROM w WHERE id = '13' FOR SHARE; COMMIT});
			$locker->query('COMMIT');
			$locker->quit;
			change(q{UPDATE T SET v = '13' WHERE id = '13'});
		}
		else
		{
			change($changes[$n]);
		}
		# tries in between, and prunes where it may
		usleep(60_000) if $n % 2;
		sql('VACUUM w') if $n % 4 == 3;
	}
	begin_witness('REPEATABLE READ');
	if ($crash)
	{
		$node->stop('immediate');
		finish_call($call);
		$_->quit for $holder, splice @witnesses;
		$node->start;
		change(q{UPDATE T SET v = v || '2' WHERE u % 11 = 0; DELETE FROM T WHERE id = '1'});
		sql("CALL rm_cut_over($id)");
		check("$column, after a crash");
		return;
	}
	$holder->query('COMMIT');
	$holder->quit;
	ends_well($call, "$column: the cut-over ends");
	is(sql("SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'w'::regclass AND attname = '$column'"), 'integer', "$column: in the new type");
	foreach my $n (0 .. $#witnesses)
	{
		like($witnesses[$n]->query($compare), qr/^0 of [23]\d\d$/, "$column: witness $n finds the rows as they were");
	}
	if ($column eq 'v')
	{
		my $err = '';
		$witnesses[0]->query(q{UPDATE w SET v = 5 WHERE id = '1'});
		like($witnesses[0]->{stderr}, qr/could not serialize access/, 'a row that was changed since is not changed by an old snapshot');
		$witnesses[2]->query(q{UPDATE w SET v = 99 WHERE id = '299'; UPDATE truth SET v = 99 WHERE id = '299'; COMMIT});
		is($witnesses[2]->{stderr}, '', 'one that was not is');
	}
	$_->quit for splice @witnesses;
	check($column);
	# nothing of the old versions stays behind
	sql('VACUUM (FREEZE) w');
	check("$column, after VACUUM FREEZE");
	my $toast = sql("SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'w'::regclass");
	is(sql("SELECT count(*) FROM verify_heapam('$toast')"), '0', "$column: the TOAST table is sound");
	is(sql("SELECT count(DISTINCT chunk_id) FROM $toast"), sql('SELECT count(*) FROM w WHERE length(big) > 2100'), "$column: and has nothing that nobody refers to");
	return;
}

run('v');
run('id');
run('id', 1);

# VACUUM comes between the wait and the exchange: to the table's TOAST table, but not to
# the table, so that there are versions without their TOASTed values; and to the shadow,
# where it finds no xid that is older than itself.  Somebody keeps the cut-over from
# looking at what has changed meanwhile.
make_table();
sql(q{CALL rm_alter_type('w', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')});
my $id = sql('SELECT max(id) FROM risky_migrations.migration');
my $holder = $node->background_psql('postgres', on_error_stop => 0);
$holder->query('BEGIN; LOCK TABLE w IN SHARE UPDATE EXCLUSIVE MODE');
my $call = start_call('cut over', "CALL rm_cut_over($id)");
wait_for('EXISTS (SELECT FROM rm_progress WHERE lock_retries > 0)', 'the cut-over does not try for its lock');
change(q{INSERT INTO T VALUES ('2000', '1', 2000, repeat('x', 4000)); DELETE FROM T WHERE id = '30'});
change(qq{UPDATE T SET v = '$_', big = repeat('$_', 4000) WHERE id IN ('20', '2000')}) for 2, 3;
my $toast = sql(q{SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'w'::regclass});
my $shadow = sql('SELECT shadow::regclass FROM risky_migrations.rewrite');
my $none_so_old = qq{SELECT age(c.relfrozenxid) < age(w.xmin) FROM pg_class c, w WHERE c.oid = '$shadow'::regclass AND w.id = '2000'};
for (1 .. 1000)
{
	# the tries are in its way too
	sql("VACUUM $shadow");
	last if sql($none_so_old) eq 't';
	usleep(10_000);
}
is(sql($none_so_old), 't', 'VACUUM says that the shadow has no xid as old as those that have come to the table');
sql("VACUUM $toast");
$holder->query('COMMIT');
$holder->quit;
ends_well($call, 'the cut-over ends beside VACUUM');
check('beside VACUUM');
sql('VACUUM (FREEZE) w');
check('beside VACUUM, and after one more');

$node->stop;
done_testing();
